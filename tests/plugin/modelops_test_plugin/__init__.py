"""What an author of a plugin writes: one module per component, named by an entry point."""
