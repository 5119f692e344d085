"""The command line: `attend`, `bench` and `verify`."""
