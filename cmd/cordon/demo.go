package main

import "github.com/spf13/cobra"

func demoCommand(a *app) *cobra.Command {
	return &cobra.Command{Use: "demo", Short: "See it work, in a small internet of its own", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return nil }}
}
