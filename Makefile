.PHONY: check build format

check:  ## what CI runs
	bash .ci/run

build:  ## compile the native modules in place
	python setup.py build_ext --inplace

format:
	ruff check --fix . && ruff format .
	clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
