package programs_test

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"crypto/md5"  //nolint:gosec // Debian's index of packages has it
	"crypto/sha1" //nolint:gosec // npm's and Maven's sums
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/cordonhq/cordon/client"
)

// installation is what a preset's program does with its own defaults, and the
// hosts it must have reached, by redirects too.
type installation struct {
	preset, name string
	script       string
	needs        string
	hosts        []string // of the preset
	also         string   // a second preset that it needs
	prepare      string   // what root has to do before
}

func installations() []installation {
	npm := "/usr/bin/node " + modules
	list := []installation{
		{"python", "pip 23.0", "/usr/bin/python3 -m pip install --no-cache-dir --target lib small && test -e lib/small.py", "", []string{"pypi.org", "files.pythonhosted.org"}, "", ""},
		{"python", "pip 26.3", "PYTHONPATH=TOOLS/python /usr/bin/python3 -m pip install --no-cache-dir --target lib small && test -e lib/small.py", "", []string{"pypi.org", "files.pythonhosted.org"}, "", ""},
		{"pip", "uv", "TOOLS/python/bin/uv pip install --python /usr/bin/python3 --no-cache --target lib small && test -e lib/small.py", "", []string{"pypi.org", "files.pythonhosted.org"}, "", ""},
		{"npm", "npm", emptyJS + npm + "npm/bin/npm-cli.js install small && test -e node_modules/small/index.js", "", []string{"registry.npmjs.org"}, "", ""},
		{"pnpm", "pnpm", emptyJS + npm + "pnpm/bin/pnpm.cjs add small && test -e node_modules/small/index.js", "", []string{"registry.npmjs.org"}, "", ""},
		{"yarn", "yarn 1", emptyJS + npm + "yarn/bin/yarn.js add small && test -e node_modules/small/index.js", "", []string{"registry.yarnpkg.com"}, "", ""},
		{"yarn", "yarn 4", emptyJS + "touch yarn.lock; export YARN_NODE_LINKER=node-modules YARN_HTTPS_CA_FILE_PATH=/etc/ssl/certs/ca-certificates.crt; " + npm + "@yarnpkg/cli-dist/bin/yarn.js add small && test -e node_modules/small/index.js", "", []string{"registry.yarnpkg.com"}, "", ""},
		{"cargo", "cargo", "mkdir src; touch src/lib.rs; printf '[package]\\nname=\"x\"\\nversion=\"1.0.0\"\\n[dependencies]\\nsmall=\"1\"\\n' >Cargo.toml; export CARGO_HTTP_CAINFO=/etc/ssl/certs/ca-certificates.crt; cargo fetch && ls cargo/registry/src/*/small-1.0.0/src/lib.rs",
			tools + "/rust/bin/cargo", []string{"index.crates.io", "static.crates.io"}, "", ""},
		{"go", "go", "printf 'module x\\n\\ngo 1.21\\n\\nrequire small.test/small v1.0.0\\n' >go.mod; GONOSUMDB='small.test/*' go mod download && test -e gopath/pkg/mod/small.test/small@v1.0.0/small.go",
			tools + "/go/bin/go", []string{"proxy.golang.org", "storage.googleapis.com"}, "", ""},
		{"debian", "apt, http", debianScript("http://deb.debian.org/debian"), "", []string{"deb.debian.org"}, "", ""},
		{"apt", "apt, https", debianScript("https://deb.debian.org/debian"), "", []string{"deb.debian.org"}, "", ""},
		{"ubuntu", "apt, Ubuntu", debianScript("http://archive.ubuntu.com/ubuntu"), "", []string{"archive.ubuntu.com"}, "", ""},
		{"huggingface", "huggingface_hub", python(`from huggingface_hub import hf_hub_download; assert open(hf_hub_download("small/small", "model")).read() == "model"`), "", []string{"huggingface.co", "*.hf.co"}, "", ""},
		{"dockerhub", "an image", "TOOLS/bin/puller small/small", tools + "/bin/puller", []string{"index.docker.io", "auth.docker.io", "production.cloudflare.docker.com"}, "", ""},
		{"maven", "mvn", pom + trust +
			"MAVEN_OPTS='-Djavax.net.ssl.trustStore=trust.p12 -Djavax.net.ssl.trustStorePassword=changeit' /usr/share/maven/bin/mvn -B -q -Dmaven.repo.local=repo validate && test -e repo/org/small/small/1.0/small-1.0.pom",
			"/usr/share/maven/bin/mvn", []string{"repo.maven.apache.org"}, "", ""},
		{"github", "git clone", "git clone -q https://github.com/small/small.git && test -e small/README", "", []string{"github.com"}, "", ""},
		{"git", "archive and release by curl", "curl -fsSL -o a.tgz https://github.com/small/small/archive/main.tar.gz && curl -fsSL -o b https://github.com/small/small/releases/download/v1/small && test -s a.tgz -a -s b",
			"", []string{"github.com", "codeload.github.com", "release-assets.githubusercontent.com"}, "", ""},
		{"apk", "apk, https", apkScript("https"), tools + "/alpine/usr/sbin/apk", []string{"dl-cdn.alpinelinux.org"}, "", ""},
		{"alpine", "apk, http", apkScript("http"), tools + "/alpine/usr/sbin/apk", []string{"dl-cdn.alpinelinux.org"}, "", ""},
	}
	return append(list, gradle())
}

// trust makes a store of the lab's certificate for Java.
const trust = "keytool -importcert -noprompt -alias lab -file TOOLS/../ca.pem -keystore trust.p12 -storetype PKCS12 -storepass changeit >/dev/null 2>&1; "

func apkScript(scheme string) string {
	const alpine = "TOOLS/alpine/usr"
	return "mkdir -p r/etc/apk; echo " + scheme + "://dl-cdn.alpinelinux.org/alpine/v3.23/main >r/etc/apk/repositories; " +
		alpine + "/lib/ld-musl-x86_64.so.1 --library-path " + alpine + "/lib " + alpine + "/sbin/apk --root $PWD/r --arch x86_64 --initdb --usermode --allow-untrusted add small && test -s r/usr/share/small"
}

// gradleVersion is Debian's; the wrapper downloads what the lab has under this name.
const gradleVersion = "4.4.1"

// gradle begins with the wrapper, which downloads Gradle itself; that takes one file from
// each of its three repositories. Debian's Gradle has its libraries in /usr/share/java and
// looks for itself in /usr/share/gradle: both are put into what a sandbox has of the
// machine's /usr/share.
func gradle() installation {
	return installation{preset: "gradle", also: "github", name: "gradle and its wrapper", needs: tools + "/java/gradle-wrapper.jar",
		prepare: "mkdir /share && mount --bind /usr/share /share && mount -t tmpfs none /usr/share && ln -s /share/* /usr/share/ && rm -f /usr/share/java && mkdir /usr/share/java && " +
			"for f in /share/java/* TOOLS/jars/*; do ln -sf $f /usr/share/java/; done && ln -s TOOLS/gradle /usr/share/gradle",
		script: trust + "mkdir -p gradle/wrapper && cp TOOLS/java/gradle-wrapper.jar gradle/wrapper/ && cat >gradle/wrapper/gradle-wrapper.properties <<'X'\n" +
			"distributionBase=GRADLE_USER_HOME\ndistributionPath=wrapper/dists\nzipStoreBase=GRADLE_USER_HOME\nzipStorePath=wrapper/dists\n" +
			"distributionUrl=https\\://services.gradle.org/distributions/gradle-" + gradleVersion + "-bin.zip\nX\n" +
			"cat >build.gradle <<'X'\nrepositories { maven { url 'https://plugins.gradle.org/m2' }; google(); mavenCentral() }\nconfigurations { small }\n" +
			"dependencies { small 'org.small:plugin:1.0', 'org.small:android:1.0', 'org.small:central:1.0' }\ntask fetch(type: Copy) { from configurations.small; into 'lib' }\nX\n" +
			"export GRADLE_USER_HOME=$PWD/home JAVA_TOOL_OPTIONS=\"--add-opens=java.base/java.lang=ALL-UNNAMED -Djavax.net.ssl.trustStore=$PWD/trust.p12 -Djavax.net.ssl.trustStorePassword=changeit\"\n" +
			"$JAVA_HOME/bin/java -cp gradle/wrapper/gradle-wrapper.jar org.gradle.wrapper.GradleWrapperMain --no-daemon fetch && cat lib/plugin-1.0.jar lib/android-1.0.jar lib/central-1.0.jar >/dev/null",
		hosts: []string{"services.gradle.org", "plugins.gradle.org", "plugins-artifacts.gradle.org", "dl.google.com", "repo.maven.apache.org"}}
}

// debianScript installs as far as a user without root gets: the index and the package.
func debianScript(archive string) string {
	options := "-o Dir::State=$PWD/r -o Dir::State::status=$PWD/r/status -o Dir::Cache=$PWD/r -o Dir::Etc=$PWD/r/etc -o Dir::Etc::sourcelist=$PWD/r/list -o Debug::NoLocking=1 -o APT::Update::Error-Mode=any -o APT::Architecture=amd64"
	return "mkdir -p r/lists/partial r/archives/partial r/etc; touch r/status; echo 'deb [trusted=yes] " + archive + " stable main' >r/list; " +
		"apt-get " + options + " update && apt-get " + options + " download small && test -s small_1.0_all.deb"
}

// TestPresetsInstall installs a package with each program's own defaults, under
// the program's preset and nothing else, from registries that the lab plays with
// their redirects; and a name that is not in the preset is refused.
func TestPresetsInstall(t *testing.T) {
	m := newMachine(t)
	registries(t, m)
	ca, err := os.ReadFile(m.lab.CAFile())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Files.Write(t.Context(), tools+"/../ca.pem", bytes.NewReader(ca)); err != nil {
		t.Fatal(err)
	}
	for _, in := range installations() {
		t.Run(in.name, func(t *testing.T) {
			if in.needs != "" && !m.has(in.needs) {
				t.Skipf("the machine lacks %s", in.needs)
			}
			allowed := []string{"preset:" + in.preset}
			if in.also != "" {
				allowed = append(allowed, "preset:"+in.also)
			}
			m.rules(client.Network{DenyOut: []string{client.AllTraffic}, AllowOut: allowed})
			if in.prepare != "" {
				m.must("root", program{script: in.prepare}.at("", ""))
			}
			mark := m.lab.Recorder().Mark()
			p := program{name: in.name, script: in.script}
			o, err := m.run("install", p.at("https", "none.test"), limit)
			if err != nil {
				t.Fatal(err)
			}
			if o.Exit != 0 {
				t.Errorf("exit %d after %.1f s:\n%s", o.Exit, o.Seconds, o.Output)
			}
			m.reached(t, in)
			for _, url := range []string{"https://denied.test/", "https://upload.pypi.org/", "http://denied.test/"} {
				o, err := m.run("other", "curl -fsS --max-time 20 "+url, limit)
				if err != nil || o.Exit == 0 {
					t.Errorf("%s is reached under preset:%s: %v %s", url, in.preset, err, o.Output)
				}
			}
			if seen := m.lab.Recorder().Since(mark); seen.Err() != nil || seen.AskedFor("denied.test") || seen.AskedFor("upload.pypi.org") {
				t.Errorf("a name outside of preset:%s left the machine (%v)", in.preset, seen.Err())
			}
		})
	}
}

// reached looks the hosts up in the flow log, where the rule names them.
func (m *machine) reached(t *testing.T, in installation) {
	t.Helper()
	missing := map[string]bool{}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		events, err := m.Events(t.Context(), client.EventOptions{Limit: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		clear(missing)
		for _, h := range in.hosts {
			missing["preset:"+in.preset+" "+h] = true
		}
		for i := range events {
			if e := &events[i]; e.Verdict == client.Allowed && e.Protocol != "dns" && e.Rule.Id == "allow[0]" {
				delete(missing, e.Rule.Text)
			}
		}
		if len(missing) == 0 {
			return
		}
		if time.Now().After(end) {
			break
		}
	}
	for rule := range missing {
		t.Errorf("no flow was allowed by allow[0] %s", rule)
	}
}

// registries makes the lab's web play the package registries, with one package.
func registries(t *testing.T, m *machine) {
	t.Helper()
	site := func(host string, files map[string][]byte) { m.lab.Site(host, static(files)) }
	wheel := zipped(t, map[string]string{"small.py": "", "small-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n",
		"small-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: lab\nRoot-Is-Purelib: true\nTag: py3-none-any\n", "small-1.0.dist-info/RECORD": "small.py,,\n"})
	const wheelName = "small-1.0-py3-none-any.whl"
	site("pypi.org", map[string][]byte{"/simple/small/": fmt.Appendf(nil, `<!DOCTYPE html><html><body><a href="https://files.pythonhosted.org/packages/%s#sha256=%x">%[1]s</a></body></html>`, wheelName, sha256.Sum256(wheel))})
	site("files.pythonhosted.org", map[string][]byte{"/packages/" + wheelName: wheel})

	tgz := tarred(t, map[string]string{"package/package.json": `{"name":"small","version":"1.0.0"}`, "package/index.js": ""})
	sum512, sum1 := sha512.Sum512(tgz), sha1.Sum(tgz) //nolint:gosec // as npm has it
	meta, err := json.Marshal(map[string]any{"name": "small", "dist-tags": map[string]string{"latest": "1.0.0"},
		"time": map[string]string{"1.0.0": "2020-01-01T00:00:00.000Z"}, // without it yarn 4 thinks the version too young
		"versions": map[string]any{"1.0.0": map[string]any{
			"name": "small", "version": "1.0.0", "dist": map[string]string{"tarball": "https://registry.npmjs.org/small/-/small-1.0.0.tgz",
				"integrity": "sha512-" + base64.StdEncoding.EncodeToString(sum512[:]), "shasum": hex.EncodeToString(sum1[:])}}}})
	if err != nil {
		t.Fatal(err)
	}
	npm := map[string][]byte{"/small": meta, "/small/-/small-1.0.0.tgz": tgz}
	site("registry.npmjs.org", npm)
	site("registry.yarnpkg.com", npm)

	crate := tarred(t, map[string]string{"small-1.0.0/Cargo.toml": "[package]\nname = \"small\"\nversion = \"1.0.0\"\n", "small-1.0.0/src/lib.rs": ""})
	site("index.crates.io", map[string][]byte{"/config.json": []byte(`{"dl":"https://static.crates.io/crates","api":"https://crates.io"}`),
		"/sm/al/small": fmt.Appendf(nil, `{"name":"small","vers":"1.0.0","deps":[],"cksum":"%x","features":{},"yanked":false}`+"\n", sha256.Sum256(crate))})
	site("static.crates.io", map[string][]byte{"/crates/small/1.0.0/download": crate})

	const mod = "module small.test/small\n\ngo 1.21\n"
	archive := zipped(t, map[string]string{"small.test/small@v1.0.0/go.mod": mod, "small.test/small@v1.0.0/small.go": "package small\n"})
	golang := static(map[string][]byte{"/small.test/small/@v/v1.0.0.mod": []byte(mod), "/small.test/small/@v/v1.0.0.info": []byte(`{"Version":"v1.0.0","Time":"2026-01-01T00:00:00Z"}`)})
	m.lab.Site("proxy.golang.org", redirecting(golang, "/small.test/small/@v/v1.0.0.zip", "https://storage.googleapis.com/proxy-golang-org-prod/small.zip?Signature=x"))
	site("storage.googleapis.com", map[string][]byte{"/proxy-golang-org-prod/small.zip": archive})

	parent := "<project><modelVersion>4.0.0</modelVersion><groupId>org.small</groupId><artifactId>small</artifactId><version>1.0</version><packaging>pom</packaging></project>"
	central := repository("/maven2", "central")
	central["/maven2/org/small/small/1.0/small-1.0.pom"] = []byte(parent)
	central["/maven2/org/small/small/1.0/small-1.0.pom.sha1"] = fmt.Appendf(nil, "%x", sha1.Sum([]byte(parent))) //nolint:gosec // as Maven has it
	site("repo.maven.apache.org", central)
	site("deb.debian.org", debian(t, "/debian"))
	site("archive.ubuntu.com", debian(t, "/ubuntu"))
	site("debian.map.fastlydns.net", map[string][]byte{})
	github(t, m)
	huggingface(m)
	dockerhub(t, m)
	site("dl-cdn.alpinelinux.org", alpine(t))
	gradleSites(m)
}

// gradleSites play Gradle's own hosts and Google's repository.
func gradleSites(m *machine) {
	const release = "/gradle/gradle-distributions/releases/download/v" + gradleVersion + "/gradle-" + gradleVersion + "-bin.zip"
	m.lab.Site("services.gradle.org", redirecting(http.NotFoundHandler(), "/distributions/gradle-"+gradleVersion+"-bin.zip", "https://github.com"+release))
	m.lab.Site("plugins.gradle.org", redirecting(static(repository("/m2", "plugin")), "/m2/org/small/plugin/1.0/plugin-1.0.jar", "https://plugins-artifacts.gradle.org/org.small/plugin/1.0/x/plugin-1.0.jar"))
	m.lab.Site("plugins-artifacts.gradle.org", static(map[string][]byte{"/org.small/plugin/1.0/x/plugin-1.0.jar": []byte("plugin")}))
	m.lab.Site("dl.google.com", static(repository("/dl/android/maven2", "android")))
}

// repository is a Maven repository below base with one artifact.
func repository(base, artifact string) map[string][]byte {
	at := base + "/org/small/" + artifact + "/1.0/" + artifact + "-1.0."
	return map[string][]byte{at + "jar": []byte(artifact), at + "pom": fmt.Appendf(nil,
		"<project><modelVersion>4.0.0</modelVersion><groupId>org.small</groupId><artifactId>%s</artifactId><version>1.0</version></project>", artifact)}
}

// gradleDistribution is Debian's Gradle as Gradle's own downloads are; nothing where
// there is none.
func gradleDistribution(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	root := filepath.Join("..", "..", ".cache", "programs", "gradle")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		name = "gradle-" + gradleVersion + "/" + filepath.ToSlash(name)
		if d.IsDir() { // the wrapper makes a folder where it is told to
			_, err := z.Create(name + "/")
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		w, err := z.Create(name)
		if err == nil {
			_, err = w.Write(content)
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// alpine is a repository with one package, in the format of apk-tools 2, which version 3
// reads: two archives one behind the other, the first without an end, and an index.
func alpine(t *testing.T) map[string][]byte {
	t.Helper()
	content := []byte("small\n")
	sum := sha1.Sum(content) //nolint:gosec // as apk has it
	data := packed(t, false, entry{tar.Header{Name: "usr/", Typeflag: tar.TypeDir, Mode: 0o755}, nil}, entry{tar.Header{Name: "usr/share/", Typeflag: tar.TypeDir, Mode: 0o755}, nil},
		entry{tar.Header{Name: "usr/share/small", Mode: 0o644, PAXRecords: map[string]string{"APK-TOOLS.checksum.SHA1": hex.EncodeToString(sum[:])}}, content})
	info := fmt.Appendf(nil, "pkgname = small\npkgver = 1.0-r0\npkgdesc = small\narch = x86_64\nsize = %d\ndatahash = %x\n", len(content), sha256.Sum256(data))
	control := packed(t, true, entry{tar.Header{Name: ".PKGINFO", Mode: 0o644}, info})
	identity := sha1.Sum(control) //nolint:gosec // as apk has it
	file := slices.Concat(control, data)
	index := fmt.Appendf(nil, "C:Q1%s\nP:small\nV:1.0-r0\nA:x86_64\nS:%d\nI:%d\nT:small\nU:\nL:MIT\n\n", base64.StdEncoding.EncodeToString(identity[:]), len(file), len(content))
	const base = "/alpine/v3.23/main/x86_64/"
	return map[string][]byte{base + "small-1.0-r0.apk": file, base + "APKINDEX.tar.gz": packed(t, false, entry{tar.Header{Name: "DESCRIPTION", Mode: 0o644}, []byte("small")}, entry{tar.Header{Name: "APKINDEX", Mode: 0o644}, index})}
}

// entry is one of an archive.
type entry struct {
	header  tar.Header
	content []byte
}

// packed is a compressed archive, without its end if another follows it.
func packed(t *testing.T, more bool, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	g := gzip.NewWriter(&b)
	w := tar.NewWriter(g)
	for _, e := range entries {
		e.header.Size = int64(len(e.content))
		err := w.WriteHeader(&e.header)
		if err == nil {
			_, err = w.Write(e.content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	err := w.Flush()
	if err == nil && !more {
		err = w.Close()
	}
	if err == nil {
		err = g.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// huggingface plays the Hub: a file there is a redirect to its storage.
func huggingface(m *machine) {
	m.lab.Site("huggingface.co", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/small/small/resolve/main/model" {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("X-Repo-Commit", strings.Repeat("a", 40))
		w.Header().Set("X-Linked-Etag", `"model"`)
		w.Header().Set("X-Linked-Size", "5")
		http.Redirect(w, r, "https://us.aws.cdn.hf.co/small?Signature=x", http.StatusFound)
	}))
	m.lab.Site("us.aws.cdn.hf.co", static(map[string][]byte{"/small": []byte("model")}))
}

// dockerhub plays the registry with one image: a token from one host, blobs from another.
func dockerhub(t *testing.T, m *machine) {
	t.Helper()
	img, err := random.Image(1024, 2)
	if err != nil {
		t.Fatal(err)
	}
	store := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	push := httptest.NewServer(store)
	defer push.Close()
	ref, err := name.ParseReference(strings.TrimPrefix(push.URL, "http://") + "/small/small:latest")
	if err == nil {
		err = remote.Write(ref, img)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.lab.Site("auth.docker.io", static(map[string][]byte{"/token": []byte(`{"token":"small"}`)}))
	m.lab.Site("index.docker.io", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Authorization") != "Bearer small":
			w.Header().Set("WWW-Authenticate", `Bearer realm="https://auth.docker.io/token",service="registry.docker.io"`)
			w.WriteHeader(http.StatusUnauthorized)
		case strings.Contains(r.URL.Path, "/blobs/"):
			http.Redirect(w, r, "https://production.cloudflare.docker.com"+r.URL.Path+"?verify=x", http.StatusTemporaryRedirect)
		default:
			store.ServeHTTP(w, r)
		}
	}))
	m.lab.Site("production.cloudflare.docker.com", store)
}

// github plays a repository for git's dumb protocol, its archive and a release.
func github(t *testing.T, m *machine) {
	t.Helper()
	dir := t.TempDir()
	script := `git init -q -b main w && cd w && echo small >README && git add README && git -c user.name=x -c user.email=x@x.test commit -qm x && cd .. && git clone -q --bare w small.git && git -C small.git update-server-info`
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make a repository: %v\n%s", err, out)
	}
	files := http.StripPrefix("/small/", http.FileServer(http.Dir(filepath.Join(dir))))
	m.lab.Site("github.com", redirecting(redirecting(redirecting(files, "/gradle/gradle-distributions/releases/download/v"+gradleVersion+"/gradle-"+gradleVersion+"-bin.zip", "https://release-assets.githubusercontent.com/gradle?sig=x"), "/small/small/archive/main.tar.gz", "https://codeload.github.com/small/small/tar.gz/main"),
		"/small/small/releases/download/v1/small", "https://release-assets.githubusercontent.com/small?sig=x"))
	m.lab.Site("codeload.github.com", static(map[string][]byte{"/small/small/tar.gz/main": []byte("archive")}))
	m.lab.Site("release-assets.githubusercontent.com", static(map[string][]byte{"/small": []byte("release"), "/gradle": gradleDistribution(t)}))
}

// debian is an archive with one package.
func debian(t *testing.T, base string) map[string][]byte {
	t.Helper()
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "DEBIAN"), 0o755); err != nil {
		t.Fatal(err)
	}
	control := "Package: small\nVersion: 1.0\nArchitecture: all\nMaintainer: x <x@x.test>\nDescription: small\n"
	if err := os.WriteFile(filepath.Join(root, "DEBIAN", "control"), []byte(control), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "small.deb")
	if out, err := exec.CommandContext(t.Context(), "dpkg-deb", "--build", "--root-owner-group", root, file).CombinedOutput(); err != nil {
		t.Fatalf("make a package: %v\n%s", err, out)
	}
	deb, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	packages := fmt.Appendf(nil, "%sFilename: pool/small_1.0_all.deb\nSize: %d\nMD5sum: %x\nSHA256: %x\n", control, len(deb), md5.Sum(deb), sha256.Sum256(deb)) //nolint:gosec // as Debian has it
	release := fmt.Appendf(nil, "Origin: Debian\nSuite: stable\nCodename: stable\nDate: Tue, 01 Dec 2026 00:00:00 UTC\nArchitectures: all amd64\nComponents: main\nSHA256:\n %x %d main/binary-amd64/Packages\n %[1]x %d main/binary-all/Packages\n",
		sha256.Sum256(packages), len(packages), len(packages))
	return map[string][]byte{base + "/dists/stable/Release": release, base + "/dists/stable/main/binary-amd64/Packages": packages,
		base + "/dists/stable/main/binary-all/Packages": packages, base + "/pool/small_1.0_all.deb": deb}
}

// static serves files by path; a path with more behind a query is the same.
func static(files map[string][]byte) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, ok := files[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		switch {
		case strings.HasPrefix(r.URL.Path, "/simple/"):
			w.Header().Set("Content-Type", "text/html")
		case bytes.HasPrefix(data, []byte("{")):
			w.Header().Set("Content-Type", "application/json")
		default:
			w.Header().Set("Content-Type", "application/octet-stream")
		}
		_, _ = w.Write(data)
	})
}

func redirecting(h http.Handler, path, to string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == path {
			http.Redirect(w, r, to, http.StatusFound)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func zipped(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for name, content := range files {
		w, err := z.Create(name)
		if err == nil {
			_, err = w.Write([]byte(content))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func tarred(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var entries []entry
	for name, content := range files {
		entries = append(entries, entry{tar.Header{Name: name, Mode: 0o644}, []byte(content)})
	}
	return packed(t, false, entries...)
}
