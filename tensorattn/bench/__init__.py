"""The command `bench`: time and memory of operators and of their peers, after parity."""
