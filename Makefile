.PHONY: check fuzz check-sanitizers check-mutations build format

check:  ## what CI runs
	bash .ci/run

fuzz:  ## the property tests, with examples nobody has seen before
	OMP_NUM_THREADS=1 python -m pytest tests/kernels -q -m "not gpu" --hypothesis-profile=random

check-sanitizers:  ## the CUDA kernels, emulated, under AddressSanitizer and UBSan (python itself leaks by design)
	python setup.py --quiet build_emulated --sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 python -m pytest tests/kernels -q -k emulated --sanitized

check-mutations:  ## break each GPU kernel on purpose: its tests must fail
	OMP_NUM_THREADS=1 python -m tests.mutations

build:  ## compile the native modules in place
	python setup.py build_ext --inplace

format:
	ruff check --fix . && ruff format .
	clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
