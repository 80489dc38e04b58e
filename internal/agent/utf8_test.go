package agent

import (
	"fmt"
	"strings"
	"testing"
	runes "unicode/utf8"

	"connectrpc.com/connect"

	pb "github.com/cordonhq/cordon/api/gen/agent/process"
)

// pieces runs a script and returns the output events of both kinds as they came.
func (h *harness) pieces(t *testing.T, script string) (stdout, stderr []string) {
	t.Helper()
	stream, err := h.process().Start(t.Context(), connect.NewRequest(bash(script)))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for stream.Receive() {
		switch out := stream.Msg().GetEvent().GetData().GetOutput().(type) {
		case *pb.ProcessEvent_DataEvent_Stdout:
			stdout = append(stdout, string(out.Stdout))
		case *pb.ProcessEvent_DataEvent_Stderr:
			stderr = append(stderr, string(out.Stderr))
		}
	}
	if stream.Err() != nil {
		t.Fatal(stream.Err())
	}
	return stdout, stderr
}

func TestOutputIsCutBetweenCharacters(t *testing.T) {
	h := claimed(t)
	for name, c := range map[string]struct{ script, want string }{
		"many characters of three octets": {`head -c 100000 /dev/zero | sed 's/\x0/漢/g'`, strings.Repeat("漢", 100000)},
		"of four, after one of one":       {`printf x; head -c 40000 /dev/zero | sed 's/\x0/🙂/g'`, "x" + strings.Repeat("🙂", 40000)},
		"octets one by one":               {`for b in '\303' '\251' '\346' '\274' '\242' '\360' '\237' '\231' '\202'; do printf $b; sleep 0.05; done`, "é漢🙂"},
	} {
		for _, to := range []string{"stdout", "stderr"} {
			t.Run(name+" to "+to, func(t *testing.T) {
				script := c.script
				if to == "stderr" {
					script = "{ " + script + "; } >&2"
				}
				got, other := h.pieces(t, script)
				if to == "stderr" {
					got, other = other, got
				}
				for _, piece := range got {
					if !runes.ValidString(piece) {
						t.Fatalf("a piece of %d octets begins or ends within a character: %q … %q", len(piece), piece[:min(8, len(piece))], piece[max(0, len(piece)-8):])
					}
				}
				if all := strings.Join(got, ""); all != c.want || len(other) > 0 {
					t.Errorf("%d octets of %d, and on the other %q", len(all), len(c.want), other)
				}
			})
		}
	}
}

func TestOctetsThatAreNoTextPassAsTheyAre(t *testing.T) {
	h := claimed(t)
	for name, c := range map[string]struct{ script, want string }{
		"a lone octet at the end":                 {`printf 'a\346'`, "a\xe6"},
		"three of four at the end":                {`printf '\360\237\231'`, "\xf0\x9f\x99"},
		"a lone octet, then text later":           {`printf '\346'; sleep 0.1; printf abc`, "\xe6abc"},
		"octets that begin nothing":               {`printf '\200\201\377\300'`, "\x80\x81\xff\xc0"},
		"a held octet when the process is killed": {`printf '\346'; kill -9 $$`, "\xe6"},
		"a held octet and a child that lives on":  {`printf '\346'; sleep 2 & exit 0`, "\xe6"},
		"every octet, many times, whatever the cut": {`python3 -c "import sys; sys.stdout.buffer.write(bytes(range(256))*1000)"`, func() string {
			var all strings.Builder
			for range 1000 {
				for b := range 256 {
					all.WriteByte(byte(b))
				}
			}
			return all.String()
		}()},
	} {
		t.Run(name, func(t *testing.T) {
			got, _ := h.pieces(t, c.script)
			if all := strings.Join(got, ""); all != c.want {
				t.Errorf("got %d octets, want %d: %.40q", len(all), len(c.want), all)
			}
		})
	}
}

func FuzzUnfinished(f *testing.F) {
	for _, s := range []string{"", "a", "é", "漢", "🙂", "a\xe6", "\xe6\xbc", "\xf0\x9f\x99", "\x80\x80\x80\x80", "\xff", "\xed\xa0", "\xc0"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		n := unfinished(b)
		if n < 0 || n > 3 || n > len(b) {
			t.Fatalf("%d of %d octets held back", n, len(b))
		}
		if n > 0 && runes.FullRune(b[len(b)-n:]) {
			t.Errorf("%x is complete, or will never be", b[len(b)-n:])
		}
		// Whatever comes next, what was not held back is decoded the same.
		sent := b[:len(b)-n]
		if whole, cut := []rune(string(b)+"\x80\x80"), []rune(string(sent)); runes.Valid(sent) && fmt.Sprint(whole[:len(cut)]) != fmt.Sprint(cut) {
			t.Errorf("%x: cut within a character", b)
		}
	})
}
