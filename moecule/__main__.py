"""python -m moecule"""

from moecule.cli import main

main()
