// Measures snapshotters through containerd's API, peers taking turns, and prints every duration as JSON.
//
//	measure ROUNDS PARALLEL NAME=SOCKET...
//	measure prepare SOCKET PARENT COUNT      (leaves COUNT active snapshots behind)
//	measure empty SOCKET COUNT
//	measure beyond CALL SOCKET COUNT         (each call between two empty ones: by how many ms it was longer)
//	measure only CALL SOCKET COUNT           (waits for a line before it makes the calls)
//	measure lives ROUNDS CLIENTS NAME=SOCKET...
//	measure flood COUNT FLIGHT SOCKET        (waits for a line before, and before it removes what it made)
//	measure waiting COUNT PAIRS SOCKET       (waits for a line before the Prepares, which must not end until it looked)
//	measure beside RATE ROWS COUNT SOCKET
//	measure pairs ROUNDS NAME=SOCKET...
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

type peer struct {
	name   string
	sn     snapshots.Snapshotter
	health grpc_health_v1.HealthClient
	times  map[string][]float64
}

var ctx = context.Background()

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func dial(name, socket string) *peer {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(err)
	return &peer{name, proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), name), grpc_health_v1.NewHealthClient(conn), map[string][]float64{}}
}

func (p *peer) time(what string, call func() error) {
	started := time.Now()
	err := call()
	took := float64(time.Since(started).Nanoseconds()) / 1e6
	if err != nil {
		must(fmt.Errorf("%s: %s: %w", p.name, what, err))
	}
	p.times[what] = append(p.times[what], took)
}

func (p *peer) prepare(what, key, parent string) {
	p.time(what, func() error { _, err := p.sn.Prepare(ctx, key, parent); return err })
}

func (p *peer) round(n int) {
	id := fmt.Sprintf("bench/%d-%d/", os.Getpid(), n)
	// The empty call stands between the others, since what it costs depends on what went before.
	p.empty("empty call")
	defer p.empty("empty call")
	p.prepare("Prepare, no parent", id+"base", "")
	p.empty("empty call")
	p.time("Commit", func() error { return p.sn.Commit(ctx, id+"layer", id+"base") })
	p.empty("empty call")
	p.prepare("Prepare, committed parent", id+"child", id+"layer")
	p.empty("empty call")
	p.time("Mounts", func() error { _, err := p.sn.Mounts(ctx, id+"child"); return err })
	p.empty("empty call")
	p.time("Stat", func() error { _, err := p.sn.Stat(ctx, id+"child"); return err })
	p.empty("empty call")
	p.time("Remove", func() error { return p.sn.Remove(ctx, id+"child") })
	p.empty("empty call")
	p.time("View", func() error { _, err := p.sn.View(ctx, id+"view", id+"layer"); return err })
	p.time("Remove", func() error { return p.sn.Remove(ctx, id+"view") })
	p.time("Remove", func() error { return p.sn.Remove(ctx, id+"layer") })
}

func (p *peer) empty(what string) {
	p.time(what, func() error { _, err := p.health.Check(ctx, &grpc_health_v1.HealthCheckRequest{}); return err })
}

func (p *peer) parallel(n, count int) {
	id := fmt.Sprintf("bench/%d-p%d/", os.Getpid(), n)
	p.time("(setup)", func() error {
		if _, err := p.sn.Prepare(ctx, id+"base", ""); err != nil {
			return err
		}
		return p.sn.Commit(ctx, id+"layer", id+"base")
	})
	all := func(what string, call func(i int) error) {
		p.time(what, func() error {
			var wait sync.WaitGroup
			failed := make([]error, count)
			for i := range count {
				wait.Add(1)
				go func() { defer wait.Done(); failed[i] = call(i) }()
			}
			wait.Wait()
			for _, err := range failed {
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	all(fmt.Sprintf("%d empty calls at once", count), func(i int) error {
		_, err := p.health.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		return err
	})
	all(fmt.Sprintf("%d Prepares at once", count), func(i int) error {
		_, err := p.sn.Prepare(ctx, fmt.Sprintf("%s%d", id, i), id+"layer")
		return err
	})
	for i := range count {
		must(p.sn.Remove(ctx, fmt.Sprintf("%s%d", id, i)))
	}
	must(p.sn.Remove(ctx, id+"layer"))
}

func main() {
	args := os.Args[1:]
	if len(args) == 4 && args[0] == "prepare" {
		p, count := dial("one", args[1]), number(args[3])
		for i := range count {
			_, err := p.sn.Prepare(ctx, fmt.Sprintf("many/%d-%d", os.Getpid(), i), args[2])
			must(err)
		}
		return
	}
	if len(args) == 4 && args[0] == "only" {
		call := prepared(args[1], dial("one", args[2]), number(args[3]))
		fmt.Println("ready")
		if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
			must(err)
		}
		for i := range number(args[3]) {
			must(call(i))
		}
		fmt.Println("done")
		return
	}
	if len(args) == 4 && args[0] == "beyond" {
		must(json.NewEncoder(os.Stdout).Encode(beyond(args[1], dial("one", args[2]), number(args[3]))))
		return
	}
	if len(args) >= 4 && args[0] == "lives" {
		lives(number(args[1]), number(args[2]), args[3:])
		return
	}
	if len(args) == 4 && args[0] == "flood" {
		flood(number(args[1]), number(args[2]), dial("one", args[3]))
		return
	}
	if len(args) == 4 && args[0] == "waiting" {
		waiting(number(args[1]), number(args[2]), dial("one", args[3]), args[3])
		return
	}
	if len(args) == 5 && args[0] == "beside" {
		beside(number(args[1]), number(args[2]), number(args[3]), args[4])
		return
	}
	if len(args) >= 3 && args[0] == "pairs" {
		pairs(number(args[1]), args[2:])
		return
	}
	if len(args) == 3 && args[0] == "empty" {
		p := dial("one", args[1])
		for range number(args[2]) {
			p.empty("empty")
		}
		return
	}
	if len(args) < 3 {
		must(fmt.Errorf("usage: measure ROUNDS PARALLEL NAME=SOCKET..."))
	}
	peers := []*peer{}
	for _, one := range args[2:] {
		name, socket, _ := strings.Cut(one, "=")
		p := dial(name, socket)
		p.empty("(setup)")
		peers = append(peers, p)
	}
	for n := range number(args[0]) {
		for _, p := range peers {
			p.round(n)
			fmt.Fprintf(os.Stderr, "round %d of %s, %s\n", n+1, args[0], p.name)
		}
	}
	for _, p := range peers {
		if number(args[1]) > 0 {
			p.parallel(0, number(args[1]))
			fmt.Fprintf(os.Stderr, "%s at once, %s\n", args[1], p.name)
		}
	}
	out := map[string]map[string][]float64{}
	for _, p := range peers {
		out[p.name] = p.times
	}
	must(json.NewEncoder(os.Stdout).Encode(out))
}

// beyond makes COUNT calls of one kind, each between two empty ones that are as warm as it is.
func beyond(kind string, p *peer, count int) []float64 {
	call := prepared(kind, p, count)
	// What the preparation left to do behind the calls is done first.
	time.Sleep(4 * time.Second)
	p.empty("empty")
	for i := range count {
		p.time("call", func() error { return call(i) })
		p.empty("empty")
	}
	longer := []float64{}
	// The first calls of a kind load what the later ones have.
	for i := count / 10; i < count; i++ {
		longer = append(longer, p.times["call"][i]-(p.times["empty"][i]+p.times["empty"][i+1])/2)
	}
	return longer
}

// prepared sets COUNT calls of one kind up; the function makes the i-th of them.
func prepared(kind string, p *peer, count int) func(i int) error {
	id := fmt.Sprintf("only/%d/", os.Getpid())
	key := func(i int) string { return fmt.Sprintf("%s%d", id, i) }
	_, err := p.sn.Prepare(ctx, id+"base", "")
	must(err)
	must(p.sn.Commit(ctx, id+"layer", id+"base"))
	warm := func(parent string) {
		for i := range count {
			_, err := p.sn.Prepare(ctx, key(i), parent)
			must(err)
		}
	}
	calls := map[string]func(i int) error{
		"empty":                     func(i int) error { p.empty("empty"); return nil },
		"Prepare, no parent":        func(i int) error { _, err := p.sn.Prepare(ctx, key(i), ""); return err },
		"Prepare, committed parent": func(i int) error { _, err := p.sn.Prepare(ctx, key(i), id+"layer"); return err },
		"Commit":                    func(i int) error { return p.sn.Commit(ctx, key(i)+"c", key(i)) },
		"Remove":                    func(i int) error { return p.sn.Remove(ctx, key(i)) },
		"Mounts":                    func(i int) error { _, err := p.sn.Mounts(ctx, key(i)); return err },
		"Stat":                      func(i int) error { _, err := p.sn.Stat(ctx, key(i)); return err },
	}
	if kind == "Commit" || kind == "Remove" || kind == "Mounts" || kind == "Stat" {
		warm(id + "layer")
	}
	call, known := calls[kind]
	if !known {
		must(fmt.Errorf("%s is no call", kind))
	}
	return call
}

func number(text string) int {
	n, err := strconv.Atoi(text)
	must(err)
	return n
}
