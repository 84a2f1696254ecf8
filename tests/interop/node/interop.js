// interop: etcd3 for Node beside the library.
//
//   interop.js ENDPOINT elect PREFIX VALUE TTL  says "held KEY REVISION"; SIGTERM gives it back
//   interop.js ENDPOINT put KEY VALUE, get KEY
//
// Its lock is one key and no queue: it does not stand in one with anybody.
'use strict';
const { Election, Etcd3 } = require('etcd3');

// Before anything is said: the answer may come at once.
const told = new Promise((resolve) => process.on('SIGTERM', resolve));

async function elect(client, prefix, value, ttl) {
  const slash = prefix.lastIndexOf('/');
  Election.prefix = prefix.slice(0, slash);
  const campaign = client.election(prefix.slice(slash + 1), ttl).campaign(value);
  await new Promise((resolve, reject) => {
    campaign.on('elected', resolve);
    campaign.on('error', reject);
  });
  const key = await campaign.getCampaignKey();
  const found = await client.get(key).exec();
  console.log('held', key, found.kvs.length > 0 ? found.kvs[0].create_revision : 0);
  campaign.on('error', () => console.log('lost'));
  const busy = setInterval(() => {}, 1000); // or else Node ends
  await told;
  clearInterval(busy);
  await campaign.resign();
  console.log('released');
}

async function main() {
  const [endpoint, what, ...args] = process.argv.slice(2);
  const client = new Etcd3({ hosts: 'http://' + endpoint });
  if (what === 'elect') await elect(client, args[0], args[1], Number(args[2]));
  if (what === 'put') await client.put(args[0]).value(args[1]).exec();
  if (what === 'get') console.log(await client.get(args[0]).string());
  client.close();
}

main().catch((error) => {
  console.log('failed:', error.message);
  process.exit(1);
});
