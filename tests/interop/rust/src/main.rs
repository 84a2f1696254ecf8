// interop: the Rust client beside the library. Its locks and elections are etcd's own services.
//
//   interop ENDPOINT lock PREFIX TTL         says "held KEY REVISION"; SIGTERM gives it back
//   interop ENDPOINT elect PREFIX VALUE TTL  the same of an office
//   interop ENDPOINT put KEY VALUE, get KEY
use etcd_client::{Client, Error, LockOptions, ResignOptions};
use std::time::Duration;
use tokio::signal::unix::{signal, Signal, SignalKind};

/// A lease that is kept alive as long as the program runs.
async fn lease(client: &mut Client, ttl: i64) -> Result<i64, Error> {
    let id = client.lease_grant(ttl, None).await?.id();
    let (mut keeper, mut answers) = client.lease_keep_alive(id).await?;
    tokio::spawn(async move {
        while keeper.keep_alive().await.is_ok() && answers.message().await.is_ok() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    Ok(id)
}

async fn lock(client: &mut Client, mut told: Signal, prefix: &str, ttl: i64) -> Result<(), Error> {
    let id = lease(client, ttl).await?;
    let options = LockOptions::new().with_lease(id);
    let held = client.lock(prefix, Some(options)).await?;
    let key = held.key().to_vec();
    let found = client.get(key.clone(), None).await?;
    let revision = found.kvs().first().map_or(0, |kv| kv.create_revision());
    println!("held {} {}", String::from_utf8_lossy(&key), revision);
    told.recv().await;
    client.unlock(key).await?;
    println!("released");
    Ok(())
}

async fn elect(
    client: &mut Client,
    mut told: Signal,
    prefix: &str,
    value: &str,
    ttl: i64,
) -> Result<(), Error> {
    let id = lease(client, ttl).await?;
    let mut won = client.campaign(prefix, value, id).await?;
    let leader = won.take_leader().expect("a leader");
    println!("held {} {}", leader.key_str().unwrap_or("?"), leader.rev());
    told.recv().await;
    client.resign(Some(ResignOptions::new().with_leader(leader))).await?;
    println!("released");
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    // Before anything is said: the answer may come at once.
    let told = signal(SignalKind::terminate()).expect("a handler");
    let mut client = Client::connect([args[1]], None).await?;
    match args[2..] {
        ["lock", prefix, ttl] => {
            lock(&mut client, told, prefix, ttl.parse().expect("a TTL")).await?
        }
        ["elect", prefix, value, ttl] => {
            elect(&mut client, told, prefix, value, ttl.parse().expect("a TTL")).await?
        }
        ["put", key, value] => {
            client.put(key, value, None).await?;
        }
        ["get", key] => {
            for kv in client.get(key, None).await?.kvs() {
                println!("{}", kv.value_str().unwrap_or("?"));
            }
        }
        _ => std::process::exit(2),
    }
    Ok(())
}
