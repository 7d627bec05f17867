"""Report on runs: tables, figures, and one HTML page."""
