"""`dico-ray sweep` as a Ray job: the same settings as on the command line.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/sweep.py --config run.yaml
"""

from dico_ray.cli import main

if __name__ == "__main__":
    import sys

    sys.exit(main(["sweep", *sys.argv[1:]]))
