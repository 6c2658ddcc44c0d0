#!/bin/sh
# Checks the program that was built: sh test.sh PROGRAM
set -eu

program=$1
failed=0

expect() {
	wanted=$1
	shift
	got=$(sh "$program" "$@")
	if [ "$got" = "$wanted" ]; then
		echo "ok      $wanted"
	else
		echo "FAILED  wanted '$wanted', got '$got'"
		failed=1
	fi
}

greeting=$(cat greeting.txt)
expect "$greeting, world!"
expect "$greeting, microVM!" microVM
expect "$greeting, two words!" "two words"

[ "$failed" -eq 0 ] || exit 1
echo "All 3 tests passed on $(uname -n) (Linux $(uname -r))."
