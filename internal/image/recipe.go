package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/cordonhq/cordon/internal/sandbox"
)

// buildLimit bounds one build, slow mirrors included.
const buildLimit = 20 * time.Minute

// recipe is everything that decides a built image: two recipes that are equal
// make the same image, so its digest is the image's key. The mirror the packages
// come from is not part of it.
type recipe struct {
	Version  int      `json:"version"` // of the code in customise.go and debian.go
	Distro   string   `json:"distro"`  // "debian", "ubuntu"
	Suite    string   `json:"suite"`
	Arch     string   `json:"arch"`
	Packages []string `json:"packages"`
	Files    []file   `json:"files"`
	Links    []link   `json:"links"`
	// Exclude are patterns of files of packages that are left out: dpkg(1), --path-exclude.
	Exclude []string `json:"exclude,omitempty"`
}

// file is written into the root file system, owned by root.
type file struct {
	Path string `json:"path"`
	Mode uint32 `json:"mode"`
	Text string `json:"text"`
}

type link struct {
	Path   string `json:"path"`
	Target string `json:"target"`
}

const recipeVersion = 2

// basePackages is what every sandbox is expected to offer, and what its users
// reach for first.
var basePackages = []string{
	"bind9-dnsutils", "ca-certificates", "curl", "git", "iproute2", "iputils-ping", "jq", "less", "nano",
	"ncurses-bin", "netcat-openbsd", "openssl", "procps", "python3", "python3-pip", "python3-venv",
	"sudo", "unzip", "wget", "xz-utils", "zip",
}

// interpreterPackages are what the code interpreter's kernels run on, and what
// programs for it expect to import.
var interpreterPackages = []string{
	"esbuild", "nodejs", "npm", "python3-bs4", "python3-ipykernel", "python3-matplotlib", "python3-numpy", "python3-openpyxl", "python3-pandas",
	"python3-plotly", "python3-requests", "python3-seaborn", "python3-sklearn",
}

// interpreterExcludes is what those depend on in form only, a quarter of the image:
// headers for compiling against, static libraries, tables for fonts' tools.
var interpreterExcludes = []string{"/usr/include/boost/*", "/usr/lib/*/openblas-pthread/*.a", "/usr/share/unicode/*"}

// builtin returns the templates that are built from packages.
func builtin() map[string]func() (recipe, error) {
	return map[string]func() (recipe, error){
		"base": func() (recipe, error) { return debian("/") },
		"code-interpreter-v1": func() (recipe, error) {
			r, err := debian("/", interpreterPackages...)
			r.Exclude = interpreterExcludes
			return r, err
		},
	}
}

// starts returns what the sandboxes of a template run from the beginning, and the
// sign that it is ready. The program is the agent's: it needs no new image when it
// changes.
func starts(template string) ([]string, sandbox.Ready) {
	if template != "code-interpreter-v1" {
		return nil, sandbox.Ready{}
	}
	// It listens when its Python kernel has loaded the usual modules.
	return []string{guestAgent, "interpreter"}, sandbox.Ready{Port: 49999, Timeout: 3 * time.Minute}
}

// debian returns the recipe of the base image with further packages, of the
// release that the machine runs where that is Debian or Ubuntu.
func debian(root string, more ...string) (recipe, error) {
	rel, err := release(root)
	if err != nil {
		return recipe{}, err
	}
	packages := slices.Concat(basePackages, more)
	slices.Sort(packages)
	return recipe{
		Version:  recipeVersion,
		Distro:   rel.distro,
		Suite:    rel.suite,
		Arch:     runtime.GOARCH, // Debian names amd64 and arm64 as Go does
		Packages: packages,
		Files:    slices.Concat(sharedFiles(), packageFiles()),
		Links:    []link{{"/usr/local/bin/python", "/usr/bin/python3"}},
	}, nil
}

// key is the recipe's digest.
func (r recipe) key() string {
	b, err := json.Marshal(r)
	if err != nil {
		panic(err) // strings and numbers only
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

// build makes the image: packages first, then our own files.
func (r recipe) build(ctx context.Context, j job) (Manifest, error) {
	if err := r.bootstrap(ctx, j); err != nil {
		return Manifest{}, err
	}
	j.progress.step("customising")
	if err := r.customise(j.rootfs); err != nil {
		return Manifest{}, err
	}
	return Manifest{
		Kind:     Packages,
		Source:   fmt.Sprintf("%s %s and %d packages", r.Distro, r.Suite, len(r.Packages)),
		Platform: "linux/" + r.Arch,
		Env:      defaultEnv(),
		User:     userName,
		Workdir:  userHome,
	}, nil
}

func defaultEnv() map[string]string {
	return map[string]string{"PATH": envPath, "LANG": locale}
}

// customise turns a fresh Debian into a sandbox's root.
func (r recipe) customise(rootfs string) (err error) {
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return fmt.Errorf("open rootfs: %w", err)
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	t := tree{root}
	if err := t.strip(); err != nil {
		return err
	}
	for _, f := range r.Files {
		if err := t.write(f); err != nil {
			return err
		}
	}
	for _, l := range r.Links {
		if err := t.link(l); err != nil {
			return err
		}
	}
	return t.addUser(nil)
}
