import sys

from millrace.runtime.cli import main

sys.exit(main())
