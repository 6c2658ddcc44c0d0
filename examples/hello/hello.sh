#!/bin/sh
# Greets whoever is named, or everybody.
set -eu

name=${1:-world}
printf '%s, %s!\n' '@GREETING@' "$name"
