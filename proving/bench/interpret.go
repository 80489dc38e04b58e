package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/cordonhq/cordon/client"
)

const (
	codeAnswer = "create to first runCode result, from a warm kernel"
	codeAgain  = `runCode("1+1") in a live sandbox`

	interpreterPort = 49999
)

// code measures sandboxes with a kernel, each restored from the checkpoint that
// the first one leaves.
func (s *starts) code(ctx context.Context, st *stand) error {
	if s.Interpreter == "" {
		s.remarks = append(s.remarks, "runCode was not measured: its template is not built")
		return nil
	}
	for i := range s.Starts + 1 {
		at := time.Now()
		sb, err := st.client.Create(ctx, client.CreateOptions{Template: s.Interpreter, Timeout: 10 * time.Minute})
		if err != nil {
			return err
		}
		if err := calculate(ctx, sb); err != nil {
			return err
		}
		if i > 0 { // the first starts cold
			s.began(codeAnswer, at)
		}
		for range 7 {
			again := time.Now()
			if err := calculate(ctx, sb); err != nil {
				return err
			}
			s.began(codeAgain, again)
		}
		if err := sb.Kill(ctx); err != nil {
			return err
		}
	}
	return nil
}

// calculate runs a cell as the code-interpreter SDKs do, to the end of its answer.
func calculate(ctx context.Context, sb *client.Sandbox) error {
	req, err := sb.NewRequest(ctx, http.MethodPost, interpreterPort, "/execute", strings.NewReader(`{"code":"1+1"}`))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Access-Token", sb.AccessToken)
	res, err := sb.Do(req)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err = errors.Join(err, res.Body.Close()); err != nil {
		return err
	}
	if !bytes.Contains(body, []byte(`"text":"2"`)) {
		return fmt.Errorf("runCode: %s: %s", res.Status, body)
	}
	return nil
}
