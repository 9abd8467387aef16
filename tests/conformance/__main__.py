import sys

from .kit import main

sys.exit(main(sys.argv[1:]))
