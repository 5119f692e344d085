"""The command `python -m tensorattn attend`: operators side by side on a real recording."""
