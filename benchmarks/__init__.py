"""Speed of each op against its peers. ``python -m benchmarks.run --help`` says how; a module per op holds its rows."""
