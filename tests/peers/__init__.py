"""The test suites of transformers and peft on split models; `python -m tests.peers` runs them."""
