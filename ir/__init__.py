"""The vocabulary that every stage shares: spans and diagnostics, axes and sizes, nodes and graphs."""
