"""`python -m sutazai`."""

from sutazai.cli import main

if __name__ == "__main__":
    main()
