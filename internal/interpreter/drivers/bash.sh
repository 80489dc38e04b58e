# The bash kernel. An interactive shell goes back to its prompt when it is
# interrupted, and keeps its variables; and before each prompt it runs
# PROMPT_COMMAND. So the loop that reads cells is the prompt command: it never
# returns, and after an interrupt it is simply begun again.
#
# A request on descriptor 3 is four records, each ended by NUL: a mark, what to run
# before the cell, the cell, what to run after it. The answer on descriptor 4 is a
# line of JSON; before it the mark is written to standard output and error, between
# NULs, so that the reader knows that it has all the output.
unset HISTFILE
set +o history
exec 5>&1 6>&2

__cordon_answer() {
  builtin set +xv
  builtin eval "$__cordon_after"
  builtin printf '\0%s\0' "$__cordon_mark" >&5
  builtin printf '\0%s\0' "$__cordon_mark" >&6
  builtin printf '{"mark":"%s",%s}\n' "$__cordon_mark" "$1" >&4
  __cordon_mark=
}

__cordon_loop() {
  [ -n "${__cordon_mark-}" ] && __cordon_answer '"interrupted":true'
  while IFS= builtin read -r -d '' -u 3 __cordon_mark &&
    IFS= builtin read -r -d '' -u 3 __cordon_before &&
    IFS= builtin read -r -d '' -u 3 __cordon_cell &&
    IFS= builtin read -r -d '' -u 3 __cordon_after; do
    builtin eval "$__cordon_before"
    builtin eval "$__cordon_cell" 3<&- 4>&- 5>&- 6>&-
    __cordon_answer "\"status\":$?"
  done
  builtin exit 0
}
PROMPT_COMMAND=__cordon_loop
PS1=
