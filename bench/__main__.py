"""python -m bench: every benchmark that needs nothing but this repository, with its defaults."""
from bench import step
from config import run_command

if __name__ == "__main__":
    run_command(step.main)
