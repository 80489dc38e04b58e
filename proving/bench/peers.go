package bench

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"text/template"
	"time"

	"github.com/cordonhq/cordon/proving/lab"
)

// peer is a program that others use for the same job, as Debian packages it.
type peer struct {
	name    string
	program string
	needs   string // a file beside the program, or empty
	install string // how to get it
	config  string // a template over peerFacts
	args    []string
}

// peerFacts fill a peer's configuration.
type peerFacts struct {
	Dir              string // its working folder
	Cores            int
	Conns, Files     int // at a time
	TLSPort, WebPort int
	Names            map[string]netip.AddrPort // what it lets through, and where that is
	Web              string                    // the one of them that speaks HTTP
	Cert             string                    // PEM file with certificate and key
	Hosts            []string                  // of sandboxes; the first is the one that is loaded
	HostMap          string                    // file with a line for each: host and "sandbox" or "other"
	Domain           string
	Backend          netip.AddrPort // the loaded one's
}

const nginxStream = "/usr/lib/nginx/modules/ngx_stream_module.so"

var haproxyBase = `
global
  maxconn {{.Conns}}
defaults
  maxconn {{.Conns}}
  timeout connect 10s
  timeout client 5m
  timeout server 5m
  timeout tunnel 5m
`

var nginxBase = `
user root;
daemon off;
worker_processes {{.Cores}};
pid {{.Dir}}/nginx.pid;
error_log stderr crit;
events { worker_connections {{.Files}}; }
`

// filters judge names of a client's connections that are handed to them.
var haproxyFilter = peer{
	name: "HAProxy", program: "haproxy", install: "apt-get install haproxy",
	args: []string{"-db", "-f", "{{.Dir}}/config"},
	config: haproxyBase + `
  option splice-request
  option splice-response
frontend tls
  mode tcp
  bind 127.0.0.1:{{.TLSPort}} transparent
  tcp-request inspect-delay 5s
  acl hello req.ssl_hello_type 1
  acl listed req.ssl_sni -i{{range $name, $addr := .Names}} {{$name}}{{end}}
  tcp-request content reject if hello !listed
  tcp-request content accept if hello
  tcp-request content reject
  default_backend tls
backend tls
  mode tcp
  server where-it-was-going 0.0.0.0:0
frontend web
  mode http
  bind 127.0.0.1:{{.WebPort}} transparent
  http-request reject unless { req.hdr(host) -i{{range $name, $addr := .Names}} {{$name}}{{end}} }
  default_backend web
backend web
  mode http
  server where-it-was-going 0.0.0.0:0
`,
}

var nginxFilter = peer{
	name: "nginx", program: "nginx", needs: nginxStream, install: "apt-get install nginx libnginx-mod-stream",
	args: []string{"-p", "{{.Dir}}", "-c", "{{.Dir}}/config", "-e", "stderr"},
	config: "load_module " + nginxStream + ";" + nginxBase + `
stream {
  map $ssl_preread_server_name $upstream {
{{range $name, $addr := .Names}}    {{$name}} {{$addr}};
{{end}}    default "";
  }
  server { listen {{.TLSPort}}; ssl_preread on; proxy_pass $upstream; proxy_timeout 5m; proxy_half_close on; }
}
http {
  access_log off;
  server { listen {{.WebPort}} default_server; return 444; }
  server { listen {{.WebPort}}; server_name {{.Web}}; location / { proxy_pass http://{{index .Names .Web}}; proxy_set_header Host $host; } }
}
`,
}

// fronts end TLS and route by host.
var haproxyFront = peer{
	name: "HAProxy", program: "haproxy", install: "apt-get install haproxy",
	args: []string{"-db", "-f", "{{.Dir}}/config"},
	config: haproxyBase + `
  mode http
frontend https
  bind 127.0.0.1:{{.TLSPort}} ssl crt {{.Cert}} alpn h2,http/1.1
  use_backend %[req.hdr(host),lower,map_str({{.HostMap}},other)]
backend other
backend sandbox
  option forwardfor
  http-reuse always
  server sandbox {{.Backend}}
`,
}

var nginxFront = peer{
	name: "nginx", program: "nginx", install: "apt-get install nginx",
	args: []string{"-p", "{{.Dir}}", "-c", "{{.Dir}}/config", "-e", "stderr"},
	config: nginxBase + `
http {
  access_log off;
  keepalive_requests 100000000;
  map_hash_bucket_size 128;
  map_hash_max_size 8192;
  map $host $sandbox {
{{range $i, $host := .Hosts}}    {{$host}} {{if $i}}other{{else}}sandbox{{end}};
{{end}}  }
  map $http_upgrade $connection_upgrade { default upgrade; '' ''; }
  upstream sandbox { server {{.Backend}}; keepalive 256; keepalive_requests 100000000; }
  upstream other { server 127.0.0.1:1; }
  server {
    listen 127.0.0.1:{{.TLSPort}} ssl http2;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_certificate {{.Cert}};
    ssl_certificate_key {{.Cert}};
    location / {
      proxy_pass http://$sandbox;
      proxy_http_version 1.1;
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $remote_addr;
      proxy_set_header X-Forwarded-Proto https;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
      proxy_read_timeout 5m;
      client_max_body_size 0;
      proxy_request_buffering off;
      proxy_max_temp_file_size 0;
    }
  }
}
`,
}

var caddyFront = peer{
	name: "Caddy", program: "caddy", install: "apt-get install caddy",
	args: []string{"run", "--config", "{{.Dir}}/config", "--adapter", "caddyfile"},
	config: `
{
  admin off
  auto_https off
  storage file_system {{.Dir}}
  log {
    level ERROR
  }
}
https://*.{{.Domain}}:{{.TLSPort}} {
  bind 127.0.0.1
  tls {{.Cert}} {{.Cert}}
  map {host} {sandbox} {
{{range $i, $host := .Hosts}}    {{$host}} {{if $i}}127.0.0.1:1{{else}}{{$.Backend}}{{end}}
{{end}}    default 127.0.0.1:1
  }
  reverse_proxy {sandbox}
}
`,
}

// missing says why a peer cannot be measured, or nothing.
func (p peer) missing() string {
	if _, err := exec.LookPath(p.program); err != nil {
		return fmt.Sprintf("%s is not installed: %s", p.name, p.install)
	}
	if p.needs == "" {
		return ""
	}
	if _, err := os.Stat(p.needs); err != nil {
		return fmt.Sprintf("%s lacks %s: %s", p.name, p.needs, p.install)
	}
	return ""
}

// startPeer starts a peer in a namespace and waits until it listens.
func (r *run) startPeer(ctx context.Context, ns *lab.Netns, p peer, facts peerFacts) (*process, error) {
	dir, err := r.folder(p.program)
	if err != nil {
		return nil, err
	}
	facts.Dir, facts.Cores, facts.Files = dir, runtime.NumCPU(), min(r.files-100, 200_000)
	facts.Conns = facts.Files * 36 / 100 // two files each, and pipes
	config, err := fill(p.config, facts)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "config"), []byte(config), 0o644); err != nil {
		return nil, err
	}
	args := make([]string, len(p.args))
	for i, a := range p.args {
		if args[i], err = fill(a, facts); err != nil {
			return nil, err
		}
	}
	started := &process{cmd: exec.Command(p.program, args...), stderr: &bytes.Buffer{}}
	started.cmd.Stdout, started.cmd.Stderr = started.stderr, started.stderr
	started.cmd.Dir, started.cmd.Env = dir, append(os.Environ(), "HOME="+dir)
	if err := ns.Do(started.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c, err := ns.Dial(ctx, "tcp", netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(facts.TLSPort)).String())
		if err == nil {
			c.Close()
			return started, nil
		}
		if ctx.Err() != nil || time.Now().After(end) {
			started.stop()
			return nil, fmt.Errorf("%s does not listen: %w: %s", p.name, err, started.stderr)
		}
	}
}

func fill(text string, facts peerFacts) (string, error) {
	t, err := template.New("").Parse(text)
	if err != nil {
		return "", err
	}
	var b bytes.Buffer
	err = t.Execute(&b, facts)
	return b.String(), err
}
