package conformance

func ingressCases() []Case { return nil }
