# Questions to a guest about everything that a program in it can see. Answers go to standard output, each behind a line
# `### NAME`. Needs no more than Debian's smallest system: coreutils, sed, grep, perl. What differs from one look to the next by
# its nature (counters, free memory) is asked as a class or left out here; what differs from VM to VM is for the reader.
export LC_ALL=C
ask() { printf '### %s\n' "$1"; sh -c "$2" 2>&1; printf '\n'; }

# The kernel and the machine
ask kernel 'uname -srvm'
ask command-line 'cat /proc/cmdline'
ask kernel-taint 'cat /proc/sys/kernel/tainted'
ask kernel-modules 'cut -d" " -f1 /proc/modules | sort'
ask file-systems 'sort /proc/filesystems'
ask cpus 'nproc; grep -E "^(processor|vendor_id|cpu family|model|model name|stepping|flags|bugs|cache size)" /proc/cpuinfo'
ask cpus-online 'cat /sys/devices/system/cpu/online /sys/devices/system/cpu/possible'
ask vulnerabilities 'grep . /sys/devices/system/cpu/vulnerabilities/*'
ask clock-source 'cat /sys/devices/system/clocksource/clocksource0/current_clocksource /sys/devices/system/clocksource/clocksource0/available_clocksource'
ask interrupts 'sed -n "s/.*  //p" /proc/interrupts | sort -u'
ask pci-devices 'cd /sys/bus/pci/devices; grep -s . */vendor */device */class'
ask virtio-devices 'cd /sys/bus/virtio/devices; grep -s . */device */status; ls -l */driver | sed "s/.* -> //"'
ask block-devices 'cd /sys/block; ls; grep -s . */size */ro */serial */queue/logical_block_size */queue/rotational */queue/scheduler */queue/discard_granularity'
ask partitions 'cat /proc/partitions'
ask serial-ports 'ls /dev/virtio-ports /sys/class/virtio-ports 2>&1; ls /sys/class/tty'
ask bus-and-class 'ls /sys/bus /sys/class'

# Memory
ask memory-total 'grep -E "^(MemTotal|SwapTotal|CommitLimit|HugePages_Total|Hugepagesize|VmallocTotal)" /proc/meminfo'
ask memory-is-there 'perl -ne "\$m{\$1}=\$2 if /(\w+):\s+(\d+)/; END { print \$m{MemAvailable} * 2 > \$m{MemTotal} ? q(most is available) : qq(only \$m{MemAvailable} of \$m{MemTotal}) }" /proc/meminfo'
ask swap 'cat /proc/swaps'
ask huge-pages 'cat /sys/kernel/mm/transparent_hugepage/enabled /sys/kernel/mm/transparent_hugepage/defrag'
ask memory-zones 'grep -E "^Node|managed" /proc/zoneinfo'

# Files
ask mounts 'sed -E "s/^[0-9]+ [0-9]+ [0-9]+:[0-9]+ //; s/ (shared|master|propagate_from):[0-9]+//g" /proc/self/mountinfo | sort'
ask mounts-of-all 'sort /proc/mounts'
ask sizes 'df -B1 --output=target,fstype,size,itotal | sort'
ask space-is-free 'df -B1 --output=target,size,avail / /root /tmp /dev/shm | perl -ne "print qq(\$1 \$3/\$2 ) . (\$3 > \$2 * 0.9 ? qq(free\n) : qq(taken\n)) =~ s/\S+\/\S+//r if /(\S+)\s+(\d+)\s+(\d+)/"'
ask space-taken-in-megabytes 'df -BM --output=target,used / /root'
ask work-disk 'grep " /root " /proc/mounts; stat -f -c "%T %s %b %c" /root; stat -c "%a %u:%g" /root; ls -lAn --time-style=+%s /root'
ask work-disk-is-written 'echo text >/root/.probe && sync /root/.probe && cat /root/.probe && rm /root/.probe'
ask root-is-written 'echo text >/var/.probe && sync /var/.probe && cat /var/.probe && rm /var/.probe'
# The links of /proc are its processes.
ask root-folder 'ls -lAn --time-style=+ / | sed -E "s/^(dr-xr-xr-x +)[0-9]+( .* proc)$/\1-\2/"'
ask files-of-etc 'find /etc -xdev -printf "%p %y %m %U:%G %s %l\n" | sort'
# Names and ids of the VM itself are asked for below.
ask contents-of-etc 'find /etc -xdev -type f ! -name hostname ! -name hosts ! -name machine-id -exec sha256sum {} + | sort -k2'
ask files-of-run-and-tmp 'find /run /tmp /var/tmp /home /srv /mnt /opt /var/lib /var/log /var/cache -xdev -printf "%p %y %m %U:%G %l\n" | sort'
ask contents-of-usr 'find /usr/bin /usr/sbin -xdev -maxdepth 1 -type f -size -40k | sort | sed -n "0~7p" | xargs sha256sum'
ask devices 'find /dev -printf "%p %y %m %U:%G %l\n" | grep -v "^/dev/pts/[0-9]" | sort; stat -c "%n %t:%T" /dev/null /dev/zero /dev/random /dev/urandom /dev/tty /dev/ptmx /dev/vd*'
ask temporary-folders 'stat -c "%n %a %u:%g" /tmp /var/tmp /run /dev/shm /dev/pts'
ask proc 'ls /proc | grep -v "^[0-9]"'
ask sys 'ls /sys /sys/kernel /sys/fs /sys/module'

# Whoever runs
ask identity 'id; getent passwd; getent group'
ask environment 'env | grep -v "^_=" | sort'
ask working-folder 'pwd'
ask file-mask 'umask'
ask limits-soft 'cat /proc/self/limits'
ask limits-of-first 'cat /proc/1/limits'
ask capabilities 'grep -E "^(Cap|NoNewPrivs|Seccomp|Speculation)" /proc/self/status'
ask signals 'grep -E "^Sig(Blk|Ign|Cgt)|^ShdPnd" /proc/self/status | grep -v SigCgt'
ask descriptors 'exec 2>/dev/null; ls -l /proc/$$/fd | sed -nE "s/.* ([0-9]+) -> (.*)/\1 \2/p" | sed -E "s/\[[0-9]+\]/[n]/" | sort -n'
ask priority 'cat /proc/self/oom_score_adj; cut -d" " -f18,19,40,41 /proc/self/stat; grep -E "^Cpus_allowed_list|^Mems_allowed_list" /proc/self/status'
ask terminal 'tty; echo "$TERM"'
ask session 'perl -e "print getpgrp() == getppid() ? q(its own group) : q(of a group), qq(\n)"'
ask locale 'echo "$LANG ${LC_CTYPE-}"; locale -a 2>/dev/null'
ask control-group 'cat /proc/self/cgroup; cat /sys/fs/cgroup/cgroup.controllers /sys/fs/cgroup/cgroup.subtree_control; ls /sys/fs/cgroup'
ask name-spaces 'for n in cgroup ipc mnt net pid time user uts; do [ "$(readlink /proc/self/ns/$n)" = "$(readlink /proc/1/ns/$n)" ] && echo "$n as the first process" || echo "$n of its own"; done'
ask processes 'perl -e "for (glob q(/proc/[0-9]*)) { open F, qq(\$_/cmdline) or next; defined <F> or next; open F, qq(\$_/status) or next; print map { /^(?:Name|Uid):\s*(.*)/ ? \$1 . q( ) : () } <F>; print qq(\n) }" | sort | uniq -c'
ask first-process 'cat /proc/1/comm; tr "\0" " " </proc/1/cmdline'
ask threads-of-kernel 'perl -e "for (glob q(/proc/[0-9]*)) { open F, qq(\$_/cmdline) or next; defined <F> and next; open F, qq(\$_/comm) or next; print <F> }" | sed -E "s/kworker.*/kworker/; s/jbd2\/.*/jbd2/" | sort -u'
ask process-can-be-signalled '(sleep 100 & kill -TERM $!; wait $!; echo $?) 2>/dev/null'

# The network
ask host-name 'uname -n; hostname; cat /etc/hostname; cat /proc/sys/kernel/domainname'
ask hosts 'cat /etc/hosts'
ask resolver 'cat /etc/resolv.conf; cat /etc/nsswitch.conf 2>/dev/null | grep hosts'
ask interfaces 'cd /sys/class/net; ls; grep -s . */address */mtu */operstate */flags */carrier */tx_queue_len */type'
ask addresses-v6 'sort /proc/net/if_inet6'
ask addresses-v4 'grep -B1 "host LOCAL" /proc/net/fib_trie | grep -oE "[0-9]+(\.[0-9]+){3}" | sort -u'
ask routes-v4 'cut -f1-4,7- /proc/net/route'
ask routes-v6 'sed -E "s/ [0-9a-f]{8} [0-9a-f]{8} ([0-9a-f]{8} +\S+)$/ \1/" /proc/net/ipv6_route | sort'
ask listening 'for f in tcp tcp6; do perl -ane "print qq(\$F[1] \$F[7]\n) if \$F[3] eq q(0A)" /proc/net/$f; done | sort; perl -ane "print qq(\$F[7]\n) if \$F[7] && \$. > 1" /proc/net/unix | sort'
ask own-name-resolves 'getent ahosts "$(hostname)" | sort -u'
ask loopback-works 'perl -MIO::Socket::INET -e "my \$l = IO::Socket::INET->new(Listen => 1, LocalAddr => q(127.0.0.1)) or die; my \$c = IO::Socket::INET->new(PeerAddr => q(127.0.0.1), PeerPort => \$l->sockport) or die; print qq(connected\n)"'
ask name-server-answers 'perl -MIO::Socket::INET -e "
    open my \$f, q(<), q(/etc/resolv.conf); my (\$s) = map { /^nameserver (\d\S+)/ } <\$f>;
    my \$c = IO::Socket::INET->new(Proto => q(udp), PeerAddr => \$s, PeerPort => 53) or die;
    send \$c, pack(q(n6), 7, 256, 1, 0, 0, 0) . qq(\x09localhost\x00) . pack(q(n2), 1, 1), 0; alarm 10;
    recv \$c, my \$answer, 512, 0; print unpack(q(n), \$answer) == 7 ? qq(answers\n) : qq(nonsense\n)"'

# Settings, time and chance. Two settings follow from how much memory is free while the kernel boots.
ask settings 'find /proc/sys -type f -perm -400 ! -path "*/random/*" ! -name "*dentry-state" ! -name "file-nr" ! -name "inode-nr" ! -name "inode-state" ! -name ns_last_pid ! -path "*/pty/nr" ! -name stable_secret ! -path "*/sched_domain/*" ! -name "aio-nr" ! -name "file-max" ! -name "user_reserve_kbytes" ! -name "drop_caches" | sort | xargs grep -s -H ""'
ask machine-id 'cat /etc/machine-id'
ask boot-id 'cat /proc/sys/kernel/random/boot_id'
ask chance 'head -c 32 /dev/urandom | od -An -tx1 | tr -d " \n"'
ask chance-is-ready 'cat /proc/sys/kernel/random/entropy_avail /proc/sys/kernel/random/poolsize; timeout 5 head -c 1 /dev/random >/dev/null && echo ready'
ask time 'date +%s'
ask time-zone 'date +%Z%z'
ask uptime 'cut -d. -f1 /proc/uptime'
ask uptime-is-sane 'perl -e "open F, q(/proc/uptime); my (\$u, \$i) = split q( ), <F>; open S, q(/proc/stat); my (\$b) = map { /^btime (\d+)/ } <S>; print abs(time - \$u - \$b) < 3 ? q(booted when it says) : q(booted at ) . \$b, qq(\n), \$u > 0 && \$u < 3600 ? q(up for less than an hour) : qq(up for \$u), qq(\n)"'
ask clocks-run 'perl -MTime::HiRes=clock_gettime,clock_getres,CLOCK_MONOTONIC,CLOCK_REALTIME -e "my @a = map { clock_gettime(\$_) } CLOCK_MONOTONIC, CLOCK_REALTIME; select undef, undef, undef, 0.3; my @b = map { clock_gettime(\$_) } CLOCK_MONOTONIC, CLOCK_REALTIME; for (0, 1) { my \$d = \$b[\$_] - \$a[\$_]; print \$d >= 0.3 && \$d < 3 ? qq(runs\n) : qq(\$d\n) } print clock_getres(CLOCK_MONOTONIC), qq(\n)"'
ask load-is-sane 'perl -ne "print \$1 < 20 ? qq(sane\n) : qq(\$1\n) if /^(\S+)/" /proc/loadavg'
# Whether the time-stamp counter could be measured at once depends on the host's load; a guest that was saved heard its maker leave.
ask kernel-complaints 'dmesg 2>/dev/null | sed -E "s/^\[[^]]*\] //" | grep -iE "error|fail|bug|oops|warn|stall|corrupt|unable|refused" | grep -vE "^tsc: Fast TSC calibration|a conversation with the host ended" | sort -u'
