package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
)

// Bytes that a container writes in its life.
const written = 1 << 20

// What a turn leaves to do behind the calls is done before the next one begins.
const rest = 300 * time.Millisecond

func print(found any) { must(json.NewEncoder(os.Stdout).Encode(found)) }

func dialed(pairs []string) []*peer {
	peers := []*peer{}
	for _, one := range pairs {
		name, socket, _ := strings.Cut(one, "=")
		p := dial(name, socket)
		p.empty("(setup)")
		peers = append(peers, p)
	}
	return peers
}

// rotated is another order of the peers in each turn.
func rotated(peers []*peer, turn int) []*peer {
	at := turn % len(peers)
	return append(append([]*peer{}, peers[at:]...), peers[:at]...)
}

func (p *peer) layer(id string) string {
	_, err := p.sn.Prepare(ctx, id+"base", "")
	must(err)
	must(p.sn.Commit(ctx, id+"layer", id+"base"))
	return id + "layer"
}

// between makes a call between two empty ones, whose mean is `what, empty` afterwards.
func (p *peer) between(what string, call func() error) {
	p.times["(empty)"] = nil
	p.empty("(empty)")
	p.time(what, call)
	p.empty("(empty)")
	around := p.times["(empty)"]
	p.times[what+", empty"] = append(p.times[what+", empty"], (around[0]+around[1])/2)
}

// life is a container's on the host: its root filesystem made, mounted, written, unmounted, measured and removed.
func (p *peer) life(key, parent, directory string) {
	var mounts []mount.Mount
	p.between("Prepare", func() error { _, err := p.sn.Prepare(ctx, key, parent); return err })
	p.between("Mounts", func() (err error) { mounts, err = p.sn.Mounts(ctx, key); return err })
	p.time("mount", func() error { return mount.All(mounts, directory) })
	p.time("write", func() error {
		return os.WriteFile(filepath.Join(directory, "written"), make([]byte, written), 0o600)
	})
	p.time("unmount", func() error { return mount.Unmount(directory, 0) })
	p.between("Usage", func() error { _, err := p.sn.Usage(ctx, key); return err })
	p.between("Remove", func() error { return p.sn.Remove(ctx, key) })
}

// lives: ROUNDS of CLIENTS lives at once, a peer after the other.
func lives(rounds, clients int, pairs []string) {
	home, err := os.MkdirTemp("", "lives")
	must(err)
	crews := make([][]*peer, clients)
	directories := make([]string, clients)
	for c := range clients {
		crews[c] = dialed(pairs)
		directories[c] = filepath.Join(home, fmt.Sprint(c))
		must(os.Mkdir(directories[c], 0o700))
	}
	layers := map[string]string{}
	for _, p := range crews[0] {
		layers[p.name] = p.layer(fmt.Sprintf("lives/%d/", os.Getpid()))
	}
	for round := range rounds {
		for at := range crews[0] {
			var wait sync.WaitGroup
			for c := range clients {
				p := crews[c][(at+round)%len(crews[c])]
				key := fmt.Sprintf("lives/%d/%d-%d", os.Getpid(), c, round)
				wait.Go(func() {
					p.life(key, layers[p.name], directories[c])
				})
			}
			wait.Wait()
			time.Sleep(rest)
		}
		fmt.Fprintf(os.Stderr, "round %d of %d, %d at once\n", round+1, rounds, clients)
	}
	out := map[string]map[string][]float64{}
	for c := range clients {
		for _, p := range crews[c] {
			if out[p.name] == nil {
				out[p.name] = map[string][]float64{}
			}
			delete(p.times, "(setup)")
			delete(p.times, "(empty)")
			for what, times := range p.times {
				out[p.name][what] = append(out[p.name][what], times...)
			}
		}
	}
	for _, p := range crews[0] {
		must(p.sn.Remove(ctx, layers[p.name]))
	}
	print(out)
}

// flood: COUNT Prepares of one layer, FLIGHT of them in flight; all are removed afterwards.
func flood(count, flight int, p *peer) {
	id := fmt.Sprintf("flood/%d/", os.Getpid())
	layer := p.layer(id)
	time.Sleep(rest)
	fmt.Println("ready")
	line()
	var wait sync.WaitGroup
	var next atomic.Int64
	started := time.Now()
	for range flight {
		wait.Go(func() {
			for i := next.Add(1); i <= int64(count); i = next.Add(1) {
				_, err := p.sn.Prepare(ctx, fmt.Sprintf("%s%d", id, i), layer)
				must(err)
			}
		})
	}
	wait.Wait()
	print(time.Since(started).Seconds())
	line()
	for i := range count {
		must(p.sn.Remove(ctx, fmt.Sprintf("%s%d", id, i+1)))
	}
	must(p.sn.Remove(ctx, layer))
}

// waiting: once COUNT Prepares wait for a pool that does not answer, PAIRS of a Stat and an empty call.
func waiting(count, pairs int, p *peer, socket string) {
	id := fmt.Sprintf("waiting/%d/", os.Getpid())
	layer := p.layer(id)
	others := dial("others", socket)
	look := func() map[string][]float64 {
		found := map[string][]float64{}
		for range pairs {
			p.time("Stat", func() error { _, err := p.sn.Stat(ctx, layer); return err })
			p.empty("empty")
		}
		for _, what := range []string{"Stat", "empty"} {
			found[what], p.times[what] = p.times[what], nil
		}
		return found
	}
	look()
	out := map[string]map[string][]float64{"alone": look()}
	fmt.Println("ready")
	line()
	var wait sync.WaitGroup
	var done atomic.Int64
	for i := range count {
		wait.Go(func() {
			_, err := others.sn.Prepare(ctx, fmt.Sprintf("%s%d", id, i), layer)
			must(err)
			done.Add(1)
		})
	}
	time.Sleep(2 * time.Second)
	out["beside"] = look()
	if done.Load() != 0 {
		must(fmt.Errorf("%d of %d Prepares did not wait", done.Load(), count))
	}
	fmt.Println("looked")
	wait.Wait()
	for i := range count {
		must(p.sn.Remove(ctx, fmt.Sprintf("%s%d", id, i)))
	}
	must(p.sn.Remove(ctx, layer))
	print(out)
}

// beside: ROWS of COUNT Prepares alone, and beside RATE calls a second of another client that do nothing or measure.
func beside(rate, rows, count int, socket string) {
	id := fmt.Sprintf("beside/%d/", os.Getpid())
	p, other := dial("one", socket), dial("other", socket)
	layer := p.layer(id)
	for i := range rate {
		_, err := p.sn.Prepare(ctx, fmt.Sprintf("%scontainer-%d", id, i), layer)
		must(err)
	}
	calls := map[string]func(i int){
		"alone":       nil,
		"empty calls": func(_ int) { other.empty("other") },
		"Usages": func(i int) {
			_, err := other.sn.Usage(ctx, fmt.Sprintf("%scontainer-%d", id, i%rate))
			must(err)
		},
	}
	names := []string{"alone", "empty calls", "Usages"}
	made := map[string]int{}
	seconds := map[string]float64{}
	time.Sleep(2 * time.Second)
	for row := range rows {
		for at := range names {
			name := names[(at+row)%len(names)]
			stop, stopped := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(stopped)
				if calls[name] == nil {
					return
				}
				ticks := time.NewTicker(time.Second / time.Duration(rate))
				defer ticks.Stop()
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					case <-ticks.C:
						made[name]++
						calls[name](i)
					}
				}
			}()
			started := time.Now()
			for i := range count {
				p.prepare(name, fmt.Sprintf("%s%d", id, i), layer)
				p.empty(name + ", empty")
			}
			seconds[name] += time.Since(started).Seconds()
			close(stop)
			<-stopped
			for i := range count {
				must(p.sn.Remove(ctx, fmt.Sprintf("%s%d", id, i)))
			}
			time.Sleep(rest)
		}
		fmt.Fprintf(os.Stderr, "row %d of %d\n", row+1, rows)
	}
	per := map[string]float64{}
	for name, number := range made {
		per[name] = float64(number) / seconds[name]
	}
	print(map[string]any{"times": p.times, "a second": per})
}

// pairs: ROUNDS of every call, the peers taking turns, and turns at being first.
func pairs(rounds int, named []string) {
	peers := dialed(named)
	for round := range rounds + 1 {
		for _, p := range rotated(peers, round) {
			p.every(round)
			if round == 0 { // what is only paid once
				p.times = map[string][]float64{}
			}
			time.Sleep(rest)
		}
		fmt.Fprintf(os.Stderr, "round %d of %d\n", round, rounds)
	}
	out := map[string]map[string][]float64{}
	for _, p := range peers {
		delete(p.times, "(empty)")
		out[p.name] = p.times
	}
	print(out)
}

// What a turn has of each call; of those that start a program, one.
const turns = 4

func (p *peer) every(round int) {
	for turn := range turns {
		id := fmt.Sprintf("pairs/%d-%d-%d/", os.Getpid(), round, turn)
		p.between("Prepare, no parent", func() error { _, err := p.sn.Prepare(ctx, id+"base", ""); return err })
		p.between("Commit", func() error { return p.sn.Commit(ctx, id+"layer", id+"base") })
		p.between("Prepare, committed parent", func() error { _, err := p.sn.Prepare(ctx, id+"child", id+"layer"); return err })
		p.between("View", func() error { _, err := p.sn.View(ctx, id+"view", id+"layer"); return err })
		p.between("Mounts", func() error { _, err := p.sn.Mounts(ctx, id+"child"); return err })
		p.between("Stat", func() error { _, err := p.sn.Stat(ctx, id+"child"); return err })
		info, err := p.sn.Stat(ctx, id+"child")
		must(err)
		info.Labels = map[string]string{"containerd.io/snapshot/turn": fmt.Sprint(round)}
		p.between("Update", func() error { _, err := p.sn.Update(ctx, info, "labels"); return err })
		p.between("List", func() error {
			return p.sn.Walk(ctx, func(context.Context, snapshots.Info) error { return nil })
		})
		if turn == 0 {
			p.between("Usage of an active one", func() error { _, err := p.sn.Usage(ctx, id+"child"); return err })
			p.between("Usage of a layer", func() error { _, err := p.sn.Usage(ctx, id+"layer"); return err })
		}
		p.between("Remove", func() error { return p.sn.Remove(ctx, id+"child") })
		p.between("Remove of a View", func() error { return p.sn.Remove(ctx, id+"view") })
		p.between("Remove of a layer", func() error { return p.sn.Remove(ctx, id+"layer") })
	}
}

var stdin = bufio.NewReader(os.Stdin)

// line waits for the one who started this program.
func line() {
	_, err := stdin.ReadString('\n')
	must(err)
}
