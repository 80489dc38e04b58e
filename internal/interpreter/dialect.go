package interpreter

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// dialect is what differs between the drivers.
type dialect interface {
	// request writes a cell as the driver reads it.
	request(mark string, c cell) ([]byte, error)
	// interrupt is what the driver is told besides the signal, or nothing.
	interrupt(mark string) []byte
	// lines are what an answer says.
	lines(a answer) []line
	// exit is what the program's end says, if it is a usual end of a cell.
	exit(status int) (answer, bool)
}

// nodeDialect speaks JSON.
type nodeDialect struct{}

func (nodeDialect) request(mark string, c cell) ([]byte, error) {
	b, err := json.Marshal(map[string]any{"mark": mark, "code": c.code, "sandbox": c.sandbox, "cell": c.env})
	if err != nil {
		return nil, fmt.Errorf("encode the cell: %w", err)
	}
	return append(b, '\n'), nil
}

func (nodeDialect) interrupt(mark string) []byte {
	return fmt.Appendf(nil, "{\"interrupt\":%q}\n", mark)
}

func (nodeDialect) exit(int) (answer, bool) { return answer{}, false }

func (nodeDialect) lines(a answer) []line {
	switch {
	case a.Error != nil:
		return []line{errorLine(a.Error.Name, a.Error.Value, a.Error.Traceback)}
	case len(a.Result) > 0:
		return []line{resultLine(a.Result, true)}
	}
	return nil
}

// bashDialect speaks records ended by NUL, the one byte no shell variable has.
type bashDialect struct{}

var shellName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

func (bashDialect) request(mark string, c cell) ([]byte, error) {
	if strings.ContainsRune(c.code, 0) {
		return nil, errors.New("the code has a NUL byte, which bash cannot read")
	}
	var before, after strings.Builder
	for name, value := range c.sandbox {
		before.WriteString(assign(name, value))
	}
	for name, value := range c.env {
		if !shellName.MatchString(name) {
			continue // a shell has no such variables
		}
		fmt.Fprintf(&before, "__cordon_had_%[1]s=${%[1]s+x} __cordon_was_%[1]s=${%[1]s-}\n%[2]s", name, assign(name, value))
		fmt.Fprintf(&after, "if [ -n \"$__cordon_had_%[1]s\" ]; then export %[1]s=\"$__cordon_was_%[1]s\"; else unset %[1]s; fi; unset __cordon_had_%[1]s __cordon_was_%[1]s\n", name)
	}
	return []byte(strings.Join([]string{mark, before.String(), c.code, after.String(), ""}, "\x00")), nil
}

// assign is the command that sets or removes a variable.
func assign(name string, value *string) string {
	switch {
	case !shellName.MatchString(name):
		return ""
	case value == nil:
		return "unset " + name + "\n"
	}
	return "export " + name + "='" + strings.ReplaceAll(*value, "'", `'\''`) + "'\n"
}

func (bashDialect) interrupt(string) []byte { return nil }

// exit is a script's own end; -1 means a signal.
func (bashDialect) exit(status int) (answer, bool) { return answer{Status: status}, status >= 0 }

func (bashDialect) lines(a answer) []line {
	switch {
	case a.Interrupted:
		return []line{errorLine("Interrupted", "execution interrupted", "")}
	case a.Status != 0:
		status := strconv.Itoa(a.Status)
		return []line{errorLine("ExitStatus", status, "the last command ended with exit status "+status)}
	}
	return nil
}
