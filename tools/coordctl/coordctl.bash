# Completion of coordctl for bash.

_coordctl() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
  local commands="lock elect leader once who service config status dev-server"
  local options="--endpoints --user --password --cacert --cert --key --insecure-skip-tls-verify
    --command-timeout --key-prefix --json --verbose --help --help-all --version"
  local i word path="" more=""
  for ((i = 1; i < COMP_CWORD; i++)); do
    word=${COMP_WORDS[i]}
    if [[ $word == -- ]]; then  # what follows is another command
      if declare -F _command_offset > /dev/null; then _command_offset $((i + 1)); fi
      return
    fi
    case "$path:$word" in
      :lock | :elect | :leader | :once | :who | :service | :config | :status | :dev-server) path=$word ;;
      service:register | service:list | service:watch) path+=-$word ;;
      config:get | config:set | config:remove | config:list | config:watch | config:edit | \
        config:diff | config:import | config:export) path+=-$word ;;
    esac
  done

  case $prev in
    --cacert | --cert | --key)
      COMPREPLY=($(compgen -f -- "$cur"))
      return
      ;;
  esac
  case $path in
    "") more=$commands ;;
    lock) more="--ttl --timeout --grace --try --shared --permits --" ;;
    elect) more="--ttl --timeout --grace --value --" ;;
    once) more="--ttl --timeout --grace --keep --" ;;
    leader) more="--watch" ;;
    who) more="--semaphore --election" ;;
    service) more="register list watch" ;;
    service-register) more="--id --address --port --meta --ttl --check --interval --" ;;
    config) more="get set remove list watch edit diff import export" ;;
    config-set) more="--string --if-revision" ;;
    config-watch) more="--prefix --exec" ;;
    config-import | config-diff)
      if [[ $path == config-import ]]; then more="--prune"; fi
      if [[ $cur != -* ]]; then
        COMPREPLY=($(compgen -f -- "$cur"))
        return
      fi
      ;;
    dev-server) more="--listen" ;;
  esac
  # Keys of the configuration, if etcd answers at once.
  case $path in
    config-get | config-set | config-remove | config-watch | config-edit)
      if [[ $cur != -* ]]; then
        more+=" $(coordctl --command-timeout 1s config list 2> /dev/null)"
      fi
      ;;
  esac
  if [[ $cur == -* ]]; then more+=" $options"; fi
  COMPREPLY=($(compgen -W "$more" -- "$cur"))
}
complete -F _coordctl coordctl
