"""All that belongs to this study of the paper: its claims, statistics, tables and figures."""
