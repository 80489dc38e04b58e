package sdk

// areas are the sections of the table and the prefix of their methods, as the
// programs print them.
var areas = []struct{ prefix, title string }{
	{"Sandbox", "Sandbox: of the class"},
	{"sandbox", "Sandbox: of an object"},
	{"commands", "Commands"},
	{"commandHandle", "A running command"},
	{"pty", "Terminals"},
	{"files", "Files"},
	{"watchHandle", "Watching a folder"},
	{"git", "Git"},
	{"code", "Code interpreter"},
	{"sandboxPaginator", "Pages of sandboxes"},
	{"snapshotPaginator", "Pages of snapshots"},
}

// notYet says why a method does not work here; the programs assert that it is
// refused in a sentence.
var notYet = map[string]string{
	"Sandbox.mountVolume": volumes, "sandbox.mountVolume": volumes,
	"Sandbox.unmountVolume": volumes, "sandbox.unmountVolume": volumes,
	"Sandbox.hotplugMemory": size, "sandbox.hotplugMemory": size,
	"Sandbox.resize": size, "sandbox.resize": size,
	"Sandbox.commit": commit, "sandbox.commit": commit,
	"sandbox.getMcpUrl": mcp, "sandbox.getMcpToken": mcp,
}

const (
	volumes = "no volumes"
	size    = "a sandbox keeps its size"
	commit  = "the package itself refuses it outside Novita's old domains"
	mcp     = "no MCP gateway"
)

// differs says how a method that works behaves otherwise than in the cloud.
var differs = map[string]string{}

const preface = `# What works with which SDK

Every public method of the published packages, unmodified, against a live server. A test of this repository shows each "works", and
writes this page: ` + "`UPDATE_DOCS=1 go test ./test/sdk -run TestMethods`" + `. Python stands for both classes, ` + "`Sandbox` and `AsyncSandbox`" + `; its methods have
the names of its style (` + "`write_files`" + ` for ` + "`writeFiles`" + `). A dash: the package has no such method.
`

const remainder = `
## Not yet

These answer 501 and say so; the same tests show it.

| part of the packages | instead |
|---|---|
| ` + "`Template` builds" + ` | ` + "`cordon image`" + `, see [templates](templates.md) |
| ` + "`Volume`" + ` | files in the sandbox, snapshots |
| ` + "`Secret`" + ` | ` + "`envs`" + ` of a sandbox |
| desktop, MCP gateway | – |
`
