package conformance

func httpCases() []Case { return nil }
