"""One function per operation: `<name>_reference` defines it in plain torch, `<name>` picks the fastest equal path."""
