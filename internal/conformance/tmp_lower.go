package conformance

func lowerCases() []Case { return nil }
