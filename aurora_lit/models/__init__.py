"""Part of aurora_lit; see ARCHITECTURE.md."""
