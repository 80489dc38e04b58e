package programs_test

import (
	"strings"

	"github.com/cordonhq/cordon/proving/stand"
)

// program is one that users run, with a script for a URL of a registry or site.
// In the script URL stands for "https://host" or "http://host", HOST for the host.
type program struct {
	name   string
	script string
	needs  string // a file that must be there; empty: none
}

func (p program) at(scheme, host string) string {
	return strings.NewReplacer("URL", scheme+"://"+host, "HOST", host, "TOOLS", tools).Replace(p.script)
}

// python and node are one-line programs.
func python(code string) string { return "PYTHONPATH=TOOLS/python /usr/bin/python3 -c '" + code + "'" }

func node(code string) string {
	return "ln -s TOOLS/node/node_modules node_modules; cat >x.mjs <<'X'\n" + code + "\nX\n/usr/bin/node x.mjs"
}

const (
	deno    = tools + "/node/node_modules/@deno/linux-x64-glibc/deno"
	modules = "TOOLS/node/node_modules/"
	emptyJS = `echo '{"name":"x","version":"1.0.0","packageManager":""}' | sed 's/,"packageManager":""//' >package.json; `
	pom     = `cat >pom.xml <<'X'
<project><modelVersion>4.0.0</modelVersion><parent><groupId>org.small</groupId><artifactId>small</artifactId><version>1.0</version><relativePath/></parent><artifactId>x</artifactId></project>
X
`
)

// managers are package managers and the like: what they do when a registry is denied.
func managers() []program {
	var out []program
	for _, p := range defaults() {
		out = append(out, p)
		for _, set := range shorter[p.name] {
			out = append(out, program{name: p.name + ", " + set, needs: p.needs, script: "export " + set + "; " + p.script})
		}
	}
	return out
}

// shorter are variables that make a program end sooner.
var shorter = map[string][]string{
	"pip 26.3": {"PIP_RETRIES=0"},
	"uv":       {"UV_HTTP_RETRIES=0"},
	"npm":      {"npm_config_fetch_retries=0"},
	"pnpm":     {"npm_config_fetch_retries=0"},
	"yarn 4":   {"YARN_HTTP_RETRY=0"},
	"cargo":    {"CARGO_NET_RETRY=0"},
}

// defaults are package managers as they come.
func defaults() []program {
	return []program{
		{name: "pip 23.0", script: "/usr/bin/python3 -m pip download --no-deps --no-cache-dir -d lib --trusted-host HOST -i URL/simple small"},
		{name: "pip 26.3", script: "PYTHONPATH=TOOLS/python /usr/bin/python3 -m pip download --no-deps --no-cache-dir -d lib --trusted-host HOST -i URL/simple small"},
		{name: "uv", script: "TOOLS/python/bin/uv pip install --python /usr/bin/python3 --no-cache --target lib --index-url URL/simple small"},
		{name: "npm", script: emptyJS + "/usr/bin/node " + modules + "npm/bin/npm-cli.js install --registry URL/ small"},
		{name: "pnpm", script: emptyJS + "/usr/bin/node " + modules + "pnpm/bin/pnpm.cjs add --registry URL/ small"},
		{name: "yarn 1", script: emptyJS + "/usr/bin/node " + modules + "yarn/bin/yarn.js add --registry URL/ small"},
		{name: "yarn 4", script: emptyJS + "touch yarn.lock; export YARN_NPM_REGISTRY_SERVER=URL YARN_UNSAFE_HTTP_WHITELIST=HOST; /usr/bin/node " + modules + "@yarnpkg/cli-dist/bin/yarn.js add small"},
		{name: "cargo", needs: tools + "/rust/bin/cargo", script: "mkdir -p src cargo; touch src/lib.rs; printf '[package]\\nname=\"x\"\\nversion=\"1.0.0\"\\n[dependencies]\\nsmall=\"1\"\\n' >Cargo.toml; " +
			"printf '[source.crates-io]\\nreplace-with=\"r\"\\n[source.r]\\nregistry=\"sparse+URL/\"\\n' >cargo/config.toml; cargo fetch"},
		{name: "go", needs: tools + "/go/bin/go", script: "printf 'module x\\n\\ngo 1.21\\n\\nrequire small.test/small v1.0.0\\n' >go.mod; GOPROXY=URL GONOSUMDB='*' go mod download"},
		{name: "apt", script: aptScript("")},
		{name: "apt, Acquire::Retries=0", script: aptScript("-o Acquire::Retries=0")},
		{name: "mvn", needs: "/usr/share/maven/bin/mvn", script: pom + "printf '<settings><mirrors><mirror><id>r</id><mirrorOf>*</mirrorOf><url>URL/maven2</url></mirror></mirrors></settings>' >s.xml; " +
			"/usr/share/maven/bin/mvn -B -q -s s.xml -Dmaven.repo.local=repo validate"},
		{name: "git", script: "git ls-remote URL/small/small.git"},
	}
}

func aptScript(option string) string {
	return "mkdir -p r/lists/partial r/archives/partial r/etc; echo 'deb [trusted=yes] URL/debian stable main' >r/list; " +
		"apt-get -o Dir::State=$PWD/r -o Dir::State::status=/dev/null -o Dir::Cache=$PWD/r -o Dir::Etc=$PWD/r/etc -o Dir::Etc::sourcelist=$PWD/r/list -o Debug::NoLocking=1 " +
		option + " update"
}

// clients are programs and libraries that make one request.
func clients() []program {
	return []program{
		{name: "curl", script: "curl -sS URL/"},
		{name: "wget", script: "wget -nv -O page URL/"},
		{name: "wget --tries=1", script: "wget --tries=1 -nv -O page URL/"},
		{name: "Python urllib", script: python(`import urllib.request; urllib.request.urlopen("URL/").read()`)},
		{name: "Python requests", script: python(`import requests; r = requests.get("URL/"); print(r.status_code, r.text); r.raise_for_status()`)},
		{name: "Python httpx", script: python(`import httpx; r = httpx.get("URL/"); print(r.status_code, r.text); r.raise_for_status()`)},
		{name: "Python aiohttp", script: "cat >x.py <<'X'\nimport aiohttp, asyncio\nasync def main():\n  async with aiohttp.ClientSession() as s:\n    async with s.get('URL/') as r:\n      print(r.status, await r.text())\n      r.raise_for_status()\nasyncio.run(main())\nX\nPYTHONPATH=TOOLS/python /usr/bin/python3 x.py"},
		{name: "Node fetch", script: node(`const r = await fetch("URL/"); console.log(r.status, await r.text()); process.exit(r.ok ? 0 : 1)`)},
		{name: "Node https", script: node(`import http from "http"; import https from "https"; ("URL".startsWith("https") ? https : http).get("URL/", r => { console.log(r.statusCode, r.statusMessage); process.exit(r.statusCode == 200 ? 0 : 1) })`)},
		{name: "undici 7", script: node(`import { request } from "undici"; const r = await request("URL/"); console.log(r.statusCode, await r.body.text()); process.exit(r.statusCode == 200 ? 0 : 1)`)},
		{name: "axios", script: node(`import axios from "axios"; const r = await axios.get("URL/"); console.log(r.status)`)},
		{name: "got", script: node(`import got from "got"; const r = await got("URL/"); console.log(r.statusCode)`)},
		{name: "Deno cache", needs: deno, script: "echo 'import \"URL/small.ts\"' >x.ts; " + deno + " cache --allow-import x.ts"},
		{name: "Deno fetch", needs: deno, script: "echo 'const r = await fetch(\"URL/\"); console.log(r.status, await r.text()); Deno.exit(r.ok ? 0 : 1)' >x.ts; " + deno + " run --allow-net x.ts"},
		{name: "Go net/http", script: "TOOLS/bin/goclient get URL/"},
		{name: "ureq", needs: tools + "/bin/ureqget", script: "TOOLS/bin/ureqget URL/"},
		{name: "Java HttpClient", needs: tools + "/java/JavaClient.class", script: "$JAVA_HOME/bin/java -Xshare:auto -cp TOOLS/java JavaClient client URL/"},
		{name: "Java URLConnection", needs: tools + "/java/JavaClient.class", script: "$JAVA_HOME/bin/java -Xshare:auto -cp TOOLS/java JavaClient connection URL/"},
		// It exits 0 whatever it shows. Its launcher, /usr/bin/chromium, wants a folder in /etc.
		{name: "Chromium", needs: stand.Chromium, script: "/usr/lib/chromium/chromium --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --user-data-dir=$PWD/profile " +
			"--disable-background-networking --disable-component-update --no-first-run --dump-dom URL/ 2>errors >page || { cat errors; exit 9; }; " +
			"if grep -o 'Page load failed: .*' errors; then exit 1; fi; sed 's/<[^>]*>/\\n/g' page; ! grep -q '# denied' page"},
	}
}

// lookups resolve a name and do nothing else.
func lookups() []program {
	return []program{
		{name: "glibc", needs: tools + "/bin/lookup-gcc", script: "TOOLS/bin/lookup-gcc HOST"},
		{name: "musl", needs: tools + "/bin/lookup-musl-gcc", script: "TOOLS/bin/lookup-musl-gcc HOST"},
		{name: "Go resolver", needs: tools + "/bin/goclient", script: "TOOLS/bin/goclient lookup HOST"},
		{name: "Node dns.lookup", script: node(`import dns from "dns/promises"; await dns.lookup("HOST")`)},
		{name: "Node dns.resolve4", script: node(`import dns from "dns/promises"; await dns.resolve4("HOST")`)},
		{name: "Java InetAddress", needs: tools + "/java/JavaClient.class", script: "$JAVA_HOME/bin/java -Xshare:auto -cp TOOLS/java JavaClient lookup HOST"},
	}
}
