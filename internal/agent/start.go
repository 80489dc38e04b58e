package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	pb "github.com/cordonhq/cordon/api/gen/agent/process"
	"github.com/cordonhq/cordon/internal/agent/wire"
)

// startTag marks the template's start command among the processes.
const startTag = "start"

// readyLimit bounds one question whether a start command is ready.
const readyLimit = 4 * time.Second

// postStart runs a template's start command. It outlives the request, and the
// sandbox's later claims.
func (a *Agent) postStart(w http.ResponseWriter, r *http.Request) {
	var req wire.Start
	if err := readJSON(w, r, &req); err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	if len(req.Args) == 0 {
		writeError(w, http.StatusBadRequest, "args: name a command")
		return
	}
	p, err := a.asTemplate(&req)
	if err != nil {
		writeError(w, http.StatusUnprocessableEntity, err.Error())
		return
	}
	a.log.Info("start command runs", "pid", p.pid)
	w.WriteHeader(http.StatusNoContent)
}

// asTemplate starts a command as it would start for an owner who asked for
// nothing.
func (a *Agent) asTemplate(req *wire.Start) (*process, error) {
	c := &claim{Claim: wire.Claim{DefaultUser: req.User, DefaultWorkdir: req.Workdir, EnvVars: req.EnvVars}}
	if err := c.complete(); err != nil {
		return nil, err
	}
	u, err := a.userOrDefault(c, "")
	if err != nil {
		return nil, err
	}
	tag := startTag
	cmd := command{
		config: &pb.ProcessConfig{Cmd: req.Args[0], Args: req.Args[1:]}, tag: &tag,
		user: u, env: a.environment(c, u, nil),
	}
	if cmd.dir, err = directory(c, u, cmd.config); err != nil {
		return nil, err
	}
	if cmd.path, err = findProgram(req.Args[0], cmd.dir, cmd.env); err != nil {
		return nil, err
	}
	p, sub, err := a.procs.start(cmd)
	if err != nil {
		return nil, err
	}
	p.unsubscribe(sub)
	return p, nil
}

// postReady answers 204 when the start command is ready and 425 with the reason
// while it is not.
func (a *Agent) postReady(w http.ResponseWriter, r *http.Request) {
	var req wire.Ready
	if err := readJSON(w, r, &req); err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), readyLimit)
	defer cancel()
	if err := a.ready(ctx, &req); err != nil {
		writeError(w, http.StatusTooEarly, err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (a *Agent) ready(ctx context.Context, req *wire.Ready) error {
	if req.Port != 0 {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort("localhost", strconv.Itoa(int(req.Port))))
		if err != nil {
			return err
		}
		conn.Close()
	}
	if req.Command == "" {
		return nil
	}
	check := req.Start
	check.Args = []string{"/bin/sh", "-c", req.Command}
	p, err := a.asTemplate(&check)
	if err != nil {
		return err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		p.kill()
		return errors.New("the ready command does not end")
	}
	if code := p.end.GetExitCode(); code != 0 {
		return fmt.Errorf("the ready command ended with %d", code)
	}
	return nil
}
