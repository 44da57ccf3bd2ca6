"""Our engine behind the OpenAI-compatible API: `vila2-fast serve`. Nothing else imports the server's own packages."""
