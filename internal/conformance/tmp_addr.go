package conformance

func addrCases() []Case { return nil }
