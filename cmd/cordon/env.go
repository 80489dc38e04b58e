package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/spf13/cobra"
)

func envCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "env",
		Short:   "Print the lines that point the SDKs at this server",
		Long:    `Print the lines that point the SDKs, and cordon's own command line, at this server.`,
		Example: `  eval "$(sudo cordon env)"`,
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			return printEnv(a.out, &cfg)
		},
	}
}

// printEnv prints what both SDKs in both languages need. The plain API needs no
// name and no certificate; sandbox URLs need both, and the server tells each
// client its domain.
func printEnv(w io.Writer, cfg *config) error {
	key, err := readAdminKey(cfg)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s does not exist: start the server once (sudo cordon serve)", cfg.adminKeyFile())
	}
	if err != nil {
		return err
	}
	for _, sdk := range []string{"NOVITA", "E2B"} {
		fmt.Fprintf(w, "export %s_API_URL=%s\n", sdk, cfg.apiURL())
		fmt.Fprintf(w, "export %s_DOMAIN=%s\n", sdk, cfg.publicDomain())
		fmt.Fprintf(w, "export %s_API_KEY=%s\n", sdk, key)
	}
	// The same key for cordon's own verbs, run by who may not read its file.
	fmt.Fprintf(w, "export CORDON_API_URL=%s\nexport CORDON_API_KEY=%s\n", cfg.apiURL(), key)
	if cfg.TLS.localCA() {
		fmt.Fprintf(w, "export NODE_EXTRA_CA_CERTS=%s   # Node\n", cfg.caFile())
		fmt.Fprintf(w, "export SSL_CERT_FILE=%s   # Python and curl\n", cfg.hostBundle())
	}
	return nil
}
