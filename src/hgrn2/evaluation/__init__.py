"""Tasks of lm-evaluation-harness; nothing else imports lm_eval."""
