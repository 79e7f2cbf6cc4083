"""What every benchmark needs: shapes, timing, the machine's description, the command line."""
