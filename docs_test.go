package cordon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestEveryPageIsLinked demands that each page in docs is reached from another page.
func TestEveryPageIsLinked(t *testing.T) {
	pages, err := filepath.Glob("docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatalf("no pages found: %v", err)
	}
	more, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{}
	for _, p := range append(more, pages...) {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		texts[p] = string(b)
	}
	for _, page := range pages {
		linked := false
		for from, text := range texts {
			linked = linked || from != page && (strings.Contains(text, "]("+filepath.Base(page)) || strings.Contains(text, "]("+page))
		}
		if !linked {
			t.Errorf("no page links to %s", page)
		}
	}
}
