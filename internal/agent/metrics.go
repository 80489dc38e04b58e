package agent

import (
	"bufio"
	"bytes"
	"fmt"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// metrics is one sample of the sandbox's resources; sizes in bytes.
type metrics struct {
	Time       int64   `json:"ts"` // Unix seconds
	CPUCount   int     `json:"cpu_count"`
	CPUUsedPct float64 `json:"cpu_used_pct"` // of all CPUs together, 0 to 100
	MemTotal   uint64  `json:"mem_total"`
	MemUsed    uint64  `json:"mem_used"`
	MemCache   uint64  `json:"mem_cache"`
	DiskUsed   uint64  `json:"disk_used"`
	DiskTotal  uint64  `json:"disk_total"`
}

// sampler turns the kernel's CPU counters into a share of the time between two
// questions.
type sampler struct {
	proc string

	mu   sync.Mutex // guards what follows
	at   time.Time
	last cpuTimes
	pct  float64
}

type cpuTimes struct{ busy, total uint64 } // in ticks

func newSampler(proc string) *sampler { return &sampler{proc: proc} }

func (a *Agent) getMetrics(w http.ResponseWriter, _ *http.Request) {
	m, err := a.sampler.sample(time.Now())
	if err != nil {
		writeError(w, http.StatusInternalServerError, err.Error())
		return
	}
	writeJSON(w, http.StatusOK, m)
}

func (s *sampler) sample(now time.Time) (metrics, error) {
	m := metrics{Time: now.Unix(), CPUCount: runtime.NumCPU()}
	mem, err := readMeminfo(s.proc)
	if err != nil {
		return m, err
	}
	m.MemTotal, m.MemCache = mem["MemTotal"], mem["Cached"]
	m.MemUsed = m.MemTotal - min(m.MemTotal, available(mem))
	var disk syscall.Statfs_t
	if err := syscall.Statfs("/", &disk); err != nil {
		return m, fmt.Errorf("size of the disk: %w", err)
	}
	block := uint64(max(disk.Bsize, 0))
	m.DiskTotal = disk.Blocks * block
	m.DiskUsed = m.DiskTotal - min(m.DiskTotal, disk.Bfree*block)
	m.CPUUsedPct, err = s.cpu(now)
	return m, err
}

// cpu is the share of CPU time used since the previous question. Questions in
// quick succession get the same answer: a few ticks make no share.
func (s *sampler) cpu(now time.Time) (float64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.at.IsZero() && now.Sub(s.at) < 200*time.Millisecond {
		return s.pct, nil
	}
	t, err := readCPU(s.proc)
	if err != nil {
		return 0, err
	}
	if total := t.total - s.last.total; t.total > s.last.total && t.busy >= s.last.busy {
		pct := 100 * float64(t.busy-s.last.busy) / float64(total)
		s.pct = math.Round(100*pct) / 100
	}
	s.at, s.last = now, t
	return s.pct, nil
}

// readCPU sums the first line of /proc/stat (proc_stat(5)): user, nice, system,
// idle, iowait, irq, softirq, steal; guest time is part of user time.
func readCPU(proc string) (cpuTimes, error) {
	b, err := readBounded(filepath.Join(proc, "stat"))
	if err != nil {
		return cpuTimes{}, err
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	fields := strings.Fields(string(line))
	if len(fields) < 5 || fields[0] != "cpu" {
		return cpuTimes{}, fmt.Errorf("/proc/stat begins with %q instead of the CPU times", line)
	}
	var t cpuTimes
	for i, f := range fields[1:min(len(fields), 9)] {
		n, err := strconv.ParseUint(f, 10, 64)
		if err != nil {
			return cpuTimes{}, fmt.Errorf("/proc/stat: %w", err)
		}
		t.total += n
		if i != 3 && i != 4 {
			t.busy += n
		}
	}
	return t, nil
}

// readMeminfo returns the fields of /proc/meminfo in bytes.
func readMeminfo(proc string) (map[string]uint64, error) {
	b, err := os.ReadFile(filepath.Join(proc, "meminfo"))
	if err != nil {
		return nil, fmt.Errorf("read the memory's state: %w", err)
	}
	out := map[string]uint64{}
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		name, rest, ok := strings.Cut(lines.Text(), ":")
		fields := strings.Fields(rest)
		if !ok || len(fields) == 0 {
			continue
		}
		n, err := strconv.ParseUint(fields[0], 10, 54) // KiB: the bytes fit 64 bits
		if err != nil {
			continue
		}
		if len(fields) > 1 && fields[1] == "kB" {
			n <<= 10
		}
		out[name] = n
	}
	if out["MemTotal"] == 0 {
		return nil, fmt.Errorf("%s/meminfo has no MemTotal", proc)
	}
	return out, nil
}

// available is what processes can still get without swapping.
func available(mem map[string]uint64) uint64 {
	n, ok := mem["MemAvailable"]
	if !ok {
		n = mem["MemFree"] + mem["Cached"] + mem["Buffers"]
	}
	if mem["Shmem"] > 0 {
		n = min(n+stored(mem["Shmem"], spaceUsed("/dev/shm"), spaceUsed("/")), mem["MemTotal"])
	}
	return n
}

// stored is how much of what counts as shared memory is files on disk. Once it
// was checkpointed, gVisor counts the pages of the writable layer, too, which
// are in a file of the host's; what is in file systems in memory really is.
func stored(shmem, inMemory, onDisk uint64) uint64 {
	return min(shmem-min(shmem, inMemory), onDisk)
}

// spaceUsed is how much is in a file system; one that is not there holds nothing.
func spaceUsed(path string) uint64 {
	var fs syscall.Statfs_t
	if syscall.Statfs(path, &fs) != nil {
		return 0
	}
	return (fs.Blocks - min(fs.Blocks, fs.Bfree)) * uint64(max(fs.Bsize, 0))
}
