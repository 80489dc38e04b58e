package conformance

func dnsCases() []Case { return nil }
