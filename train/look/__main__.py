"""python -m train.look"""

from command import exit_on_user_error
from train.look.command import main

if __name__ == "__main__":
    exit_on_user_error(main)
