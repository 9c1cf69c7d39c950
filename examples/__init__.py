"""Scripts that use Trellis; see README.md beside this file."""
