"""One module per family of published formats; ``data_tools.convert`` has the registry."""
