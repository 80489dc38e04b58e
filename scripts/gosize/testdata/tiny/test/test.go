package test

// Only is the only line.
const Only = 1
