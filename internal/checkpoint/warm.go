package checkpoint

import (
	"os"
	"strings"
	"sync"
)

// Warm knows the checkpoints of images whose start command is ready, by a key that
// names what they depend on and begins with the template and a space. A later server
// finds them again.
type Warm struct {
	vault *Vault

	mu     sync.Mutex // guards the others
	names  map[string]string
	making map[string]bool
}

// NewWarm returns the warm copies in a vault; Load finds those that exist.
func NewWarm(v *Vault) *Warm {
	return &Warm{vault: v, names: map[string]string{}, making: map[string]bool{}}
}

// Load finds what earlier servers kept and this one can restore, for which restorable
// returns nil, and returns the names.
func (w *Warm) Load(restorable func(dir string) error) map[string]bool {
	keep := map[string]bool{}
	entries, err := os.ReadDir(w.vault.dir)
	if err != nil {
		return keep
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range entries {
		if !form.MatchString(e.Name()) {
			continue
		}
		man, err := w.vault.manifestOf(e.Name())
		if err != nil || man.Label == "" || restorable(w.vault.Path(e.Name())) != nil {
			continue
		}
		if old := w.names[man.Label]; old != "" {
			delete(keep, old)
		}
		w.names[man.Label] = e.Name()
		keep[e.Name()] = true
	}
	return keep
}

// Find returns the checkpoint for a key.
func (w *Warm) Find(key string) (name string, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	name, ok = w.names[key]
	return name, ok
}

// Begin reports whether the caller is the one to make key's checkpoint; then it
// calls End, with the name or "".
func (w *Warm) Begin(key string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.making[key] || w.names[key] != "" {
		return false
	}
	w.making[key] = true
	return true
}

// End makes name the checkpoint for key, and returns those of the same template that
// it replaces.
func (w *Warm) End(key, name string) (replaced []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.making, key)
	if name == "" {
		return nil
	}
	template, _, _ := strings.Cut(key, " ")
	for other, old := range w.names {
		if t, _, _ := strings.Cut(other, " "); t == template {
			replaced = append(replaced, old)
			delete(w.names, other)
		}
	}
	w.names[key] = name
	return replaced
}

// Forget drops a checkpoint that could not be restored.
func (w *Warm) Forget(key, name string) error {
	w.mu.Lock()
	if w.names[key] == name {
		delete(w.names, key)
	}
	w.mu.Unlock()
	return w.vault.Drop(name)
}
