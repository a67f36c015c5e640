#!/bin/sh
# FalconQ's HTTP, with curl and nothing else: publish, consume, peek. Needs `ferryline up --falconq`.
#
#   sh examples/falconq.sh [http://localhost:8080]
set -eu
url=${1:-http://localhost:8080}
topic=falconq-$$

say() { printf '%s\n' "$*"; }

get() { curl --silent --show-error --fail-with-body --max-time 30 "$url$1"; echo; }

publish() { # message, priority
    curl --silent --show-error --fail-with-body --max-time 30 "$url/topic/$topic/publish" \
        -d "{\"message\": \"$1\", \"priority\": \"$2\"}"
    echo
}

expect() { # what, answer, messages in their order
    found=$(printf '%s' "$2" | grep -o '"message": "[^"]*"' | cut -d'"' -f4 | tr '\n' ' ')
    if [ "$found" != "$3" ]; then
        say "$1: expected '$3', found '$found' in $2" >&2
        exit 1
    fi
    say "$1: $found"
}

publish 'read the mail' low
publish 'put out the fire' high
publish 'water the plants' low

# High before low; a call says that the answer before it was processed.
expect 'first two' "$(get "/topic/$topic/consume?consumerID=worker&batch=2")" 'put out the fire read the mail '
expect 'then' "$(get "/topic/$topic/consume?consumerID=worker&batch=2")" 'water the plants '
expect 'nothing left' "$(get "/topic/$topic/consume?consumerID=worker&batch=2")" ''

# Another consumer has a position of its own. With ack= a call can be repeated: the same answer comes again.
answer=$(get "/topic/$topic/consume?consumerID=auditor&batch=1&ack=")
expect 'auditor' "$answer" 'put out the fire '
expect 'auditor again' "$(get "/topic/$topic/consume?consumerID=auditor&batch=1&ack=")" 'put out the fire '
ack=$(printf '%s' "$answer" | grep -o '"ack": "[^"]*"' | cut -d'"' -f4)
expect 'auditor goes on' "$(get "/topic/$topic/consume?consumerID=auditor&batch=1&ack=$ack")" 'read the mail '

# Looking moves nobody: the log in its own order.
expect 'peek' "$(get "/topic/$topic/peek?offset=0&batch=10")" 'read the mail put out the fire water the plants '
get '/topics'
get "/topics/$topic/partitions"
