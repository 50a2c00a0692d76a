"""The YAML that `fedsplit.config` composes: one folder per choice, one file per option."""
